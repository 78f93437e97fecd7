"""Turn a frozen Config dataclass into command-line flags, and run a program with it.

Flags are absl's: its parsers, flag files and spelling hints. Limits and --help are not, because
absl's show the user less: its parsers accept NaN and know no strict bound, its messages read
"invalid literal for int() with base 10", and its help sorts the flags of a Config by name.
"""

import dataclasses
import logging
import math
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import rich.cells
import rich.console
import rich.markup
import rich.table
from absl import flags
from absl import logging as absl_logging

from experiments.errors import InputError

T = TypeVar("T", bool, int, float, str)

_PARSERS: dict[type, flags.ArgumentParser[Any]] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}
_TYPE_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d.]")


def flag(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: Sequence[T] | None = None,
    affects_result: bool = True,
    added: bool = False,
) -> T:
    """Declare one field of a Config, and so one flag of the default's type.

    Args:
      default: Value of a flag that is not given.
      help: What the flag sets, with its unit.
      minimum: Smallest value allowed.
      above: Strict lower bound.
      maximum: Largest value allowed.
      choices: The only values allowed.
      affects_result: False for a setting that changes no number (a folder, say): a resumed run
        may change it.
      added: True for a setting that runs of earlier versions lack; they were trained with its
        default.
    """
    limits: list[tuple[str, Callable[[Any], bool]]] = []
    if minimum is not None:
        limits.append((f"at least {minimum}", lambda value: value >= minimum))
    if above is not None:
        limits.append((f"above {above}", lambda value: value > above))
    if maximum is not None:
        limits.append((f"at most {maximum}", lambda value: value <= maximum))
    if choices is not None:
        limits.append((f"one of {', '.join(map(str, choices))}", lambda value: value in choices))
    metadata = {
        "help": help,
        "limits": limits,
        "affects_result": affects_result,
        "added": added,
    }
    return dataclasses.field(default=default, metadata=metadata)


def validate(config: Any) -> None:
    """Check the type and the limits of every field.

    Raises:
      InputError: A value is not allowed; the message names flag, rule and value.
    """
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), types[field.name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise _refusal(field.name, _TYPE_RULES[kind], value)
        if kind is float and not math.isfinite(value):
            raise _refusal(field.name, "finite", value)
        for rule, keeps in field.metadata["limits"]:
            if not keeps(value):
                raise _refusal(field.name, rule, value)


def run(config_class: type[Any], main: Callable[[Any], int | None]) -> typing.NoReturn:
    """Build the Config from the command line, call `main` and exit with the status it returns.

    Bad input prints one line to stderr and exits with status 2.

    Args:
      config_class: A frozen dataclass whose fields are made by `flag`.
      main: The program. It returns None or 0 for success, and may raise InputError.
    """
    program = pathlib.Path(sys.argv[0]).stem
    _configure_logging(main)
    # Not absl's global flags, which hold those of every imported library.
    values = flags.FlagValues()
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flags.DEFINE_flag(_Flag(field, types[field.name]), values)
    flags.DEFINE_boolean("help", False, "Show this text.", values)
    try:
        _parse(values)
        if values["help"].value:
            print(_help(config_class, main, program))
            sys.exit(0)
        names = [field.name for field in dataclasses.fields(config_class)]
        config = config_class(**{name: values[name].value for name in names})
        validate(config)
        status = main(config)
    except InputError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lay out rows of cells as lines of text, with columns of numbers aligned right.

    Args:
      rows: The titles of the columns, then the rows below them.

    Yields:
      One line a row, as wide as its cells need: output to a file equals output to a terminal.
    """
    titles, *others = rows
    grid = rich.table.Table(box=None, pad_edge=False, header_style="")
    for title, *cells in zip(titles, *others, strict=True):
        is_text = any(cell and not _NUMBER.match(cell) for cell in cells)
        grid.add_column(
            rich.markup.escape(title), justify="left" if is_text else "right", no_wrap=True
        )
    for row in others:
        grid.add_row(*map(rich.markup.escape, row))
    width = sum(max(map(rich.cells.cell_len, column)) + 2 for column in zip(*rows, strict=True))
    console = rich.console.Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(grid)
    for line in capture.get().splitlines():
        yield line.rstrip()


class _Flag(flags.Flag[Any]):
    """The flag of one field; a value of another type is refused in the words of `validate`."""

    def __init__(self, field: "dataclasses.Field[Any]", kind: type):
        self._kind = kind
        text = field.metadata["help"]
        # boolean=True also accepts --noNAME, for false.
        super().__init__(
            _PARSERS[kind], None, field.name, field.default, text, boolean=kind is bool
        )

    def parse(self, argument: Any) -> None:
        """Parse one value; raise InputError if it is of another type."""
        try:
            super().parse(argument)
        except flags.IllegalFlagValueError:
            raise _refusal(self.name, _TYPE_RULES[self._kind], argument) from None


def _refusal(name: str, rule: str, value: Any) -> InputError:
    return InputError(f"--{name} must be {rule}, got {value!r}")


def _parse(values: flags.FlagValues) -> None:
    """Parse the command line; raise InputError for whatever absl refuses."""
    try:
        _, *positional = values(sys.argv)
    except UnicodeDecodeError as error:
        raise InputError(f"the flagfile is not a text file: {error}") from error
    except (flags.Error, ValueError) as error:
        raise InputError(str(error).removeprefix("ERROR:: ")) from error
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}: settings are --name=value")


def _help(config_class: type[Any], main: Callable[[Any], int | None], program: str) -> str:
    """Return the text of --help: a paragraph a flag, in the order of the Config."""
    purpose = sys.modules[main.__module__].__doc__ or ""
    lines = [purpose.strip(), "", f"usage: {program} [--flagfile=FILE] [--name=value ...]", ""]
    for field in dataclasses.fields(config_class):
        default = field.default
        if isinstance(default, bool):
            title, shown = f"--[no]{field.name}", str(default).lower()
        else:
            title, shown = f"--{field.name}", str(default) if default != "" else "empty"
        notes = "; ".join([f"default: {shown}", *(rule for rule, _ in field.metadata["limits"])])
        lines += [f"  {title}", _paragraph(f"{field.metadata['help']} ({notes})")]
    text = "Read flags from this file, one a line. Later flags override earlier ones."
    return "\n".join([*lines, "  --flagfile", _paragraph(text)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _configure_logging(main: Callable[[Any], int | None]) -> None:
    """Send short log lines to stderr: our own from INFO up, those of libraries from WARNING up."""
    # Until the global flags are parsed, absl's handler prints a warning with each line.
    flags.FLAGS(sys.argv[:1])
    script = getattr(sys.modules[main.__module__], "__file__", __file__)
    programs = {pathlib.Path(path).resolve().parent for path in (script, __file__)}

    def is_wanted(record: logging.LogRecord) -> bool:
        if programs & set(pathlib.Path(record.pathname).resolve().parents):
            return True
        # Checkpoints reports a failed save in one line; Orbax logs a page, and asyncio repeats
        # that page for every array.
        is_orbax = "orbax" in record.pathname or record.name == "asyncio"
        return record.levelno >= logging.WARNING and not is_orbax

    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(is_wanted)
