"""Turns a frozen Config dataclass into command-line flags, and runs a program with it."""

import dataclasses
import functools
import logging
import math
import operator
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

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d.]")
# Every test takes the bound first.
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.le),
    "above": ("above", operator.lt),
    "maximum": ("at most", operator.ge),
    "choices": ("one of", operator.contains),
}
_PARSERS: dict[type, tuple[Callable[[], Any], str]] = {
    bool: (flags.BooleanParser, "true or false"),
    int: (flags.IntegerParser, "a whole number"),
    float: (flags.FloatParser, "a number"),
    str: (flags.ArgumentParser, "text"),
}


def flag(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: Sequence[T] | None = None,
    affects_result: bool = True,
) -> T:
    """Declares one field of a Config, and so one flag.

    Args:
      default: the value when the flag is not given.
      help: what it sets, with its unit.
      minimum: the smallest value allowed.
      above: every value allowed is strictly greater.
      maximum: the largest value allowed.
      choices: the only values allowed.
      affects_result: False for a setting that changes no number (a folder, say): it may differ
        when a run is resumed.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
        "affects_result": affects_result,
    }
    return dataclasses.field(default=default, metadata=metadata)


def validate(config: Any) -> None:
    """Checks the type and the declared limits of every field.

    Raises:
      InputError: a value is not allowed; the message names flag, rule and value.
    """
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), types[field.name]
        allowed = (float, int) if kind is float else (kind,)
        if type(value) not in allowed:
            rule = _PARSERS[kind][1]
        elif kind is float and not math.isfinite(value):
            rule = "finite"
        else:
            rule = next((rule for rule, keeps in _limits(field) if not keeps(value)), "")
        if rule:
            raise InputError(f"--{field.name} must be {rule}, got {value!r}")


def run(config_class: type[Any], main: Callable[[Any], int | None]) -> typing.NoReturn:
    """Builds the Config from the command line, calls `main` and exits with what it returns.

    Whatever the user gave that cannot be used ends in one line on stderr and exit status 2.

    Args:
      config_class: a frozen dataclass whose fields are made by `flag`.
      main: the program. None and 0 mean success; it may raise InputError.
    """
    program = pathlib.Path(sys.argv[0]).stem
    _configure_logging(main)
    # A set of flags of its own: no flags of libraries, and nothing global.
    values = flags.FlagValues()
    _define_flags(config_class, values)
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
    """Lays out rows of cells in columns, numbers to the right; the first row has the titles.

    Yields:
      One line a row, however wide, so that a file gets what a terminal shows.
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


class _Parser(flags.ArgumentParser):
    """One of absl's parsers, with a message that tells what was wanted."""

    def __init__(self, kind: type):
        parser, self._wanted = _PARSERS[kind]
        self._parser = parser()

    def parse(self, argument: Any) -> Any:
        try:
            return self._parser.parse(argument)
        except ValueError:
            raise ValueError(f"must be {self._wanted}") from None


def _limits(field: "dataclasses.Field[Any]") -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """Every limit of a field: in words, and as a test of a value."""
    for name, (words, keeps) in _LIMITS.items():
        bound = field.metadata[name]
        if bound is not None:
            shown = ", ".join(map(str, bound)) if name == "choices" else bound
            yield f"{words} {shown}", functools.partial(keeps, bound)


def _define_flags(config_class: type[Any], values: flags.FlagValues) -> None:
    """Defines one flag for every field, and --help."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, text = types[field.name], field.metadata["help"]
        # boolean=True adds the form --noname.
        new: Any = flags.Flag(
            _Parser(kind), None, field.name, field.default, text, boolean=kind is bool
        )
        flags.DEFINE_flag(new, values)
    flags.DEFINE_boolean("help", False, "Show this text.", values)


def _parse(values: flags.FlagValues) -> None:
    """Parses the command line; every complaint becomes an InputError."""
    try:
        _, *positional = values(sys.argv)
    except UnicodeDecodeError as error:
        raise InputError(f"the flagfile is not a text file: {error}") from error
    except (flags.Error, ValueError) as error:
        raise InputError(str(error).removeprefix("ERROR:: ")) from error
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}: settings are --name=value")


def _help(config_class: type[Any], main: Callable[[Any], int | None], program: str) -> str:
    """The text of --help."""
    purpose = sys.modules[main.__module__].__doc__ or ""
    lines = [purpose.strip(), "", f"usage: {program} [--flagfile=FILE] [--name=value ...]", ""]
    for field in dataclasses.fields(config_class):
        default = field.default
        if isinstance(default, bool):
            title, shown = f"--[no]{field.name}", str(default).lower()
        else:
            title, shown = f"--{field.name}", str(default) if default != "" else "empty"
        notes = "; ".join([f"default: {shown}", *(rule for rule, _ in _limits(field))])
        lines += [f"  {title}", _paragraph(f"{field.metadata['help']} ({notes})")]
    text = "Read flags from this file, one a line; flags that follow on the command line win."
    return "\n".join([*lines, "  --flagfile", _paragraph(text)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _configure_logging(main: Callable[[Any], int | None]) -> None:
    """Sends short log lines to stderr: the programs' own, and the warnings of libraries."""
    # absl's handler prints a complaint of its own until the global flags are parsed.
    flags.FLAGS(sys.argv[:1])
    script = getattr(sys.modules[main.__module__], "__file__", __file__)
    programs = {pathlib.Path(path).resolve().parent for path in (script, __file__)}

    def is_wanted(record: logging.LogRecord) -> bool:
        if programs & set(pathlib.Path(record.pathname).resolve().parents):
            return True
        # Orbax logs forty lines a checkpoint, and a page for a failed one; records.py says it in
        # one. asyncio then repeats the page for every array.
        is_orbax = "orbax" in record.pathname or record.name == "asyncio"
        return record.levelno >= logging.WARNING and not is_orbax

    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(is_wanted)
