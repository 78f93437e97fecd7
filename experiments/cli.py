"""Turn a frozen Config dataclass into command-line flags, and run a program with it.

Flags are absl's: its parsers, flag files and spelling hints. Limits and --help are not, because
absl's show the user less: its parsers accept NaN and know no strict bound, its messages read
"invalid literal for int() with base 10", and its help sorts the flags of a Config by name.
"""

import contextlib
import dataclasses
import io
import logging
import math
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import rich.cells
import rich.console
import rich.markup
import rich.table
from absl import flags
from absl import logging as absl_logging

import experiments
from experiments.errors import InputError

T = TypeVar("T", bool, int, float, str)
N = TypeVar("N", int, float)

_PARSERS: dict[type, flags.ArgumentParser[Any]] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}
_GRACE_SECONDS = 3  # from a signal until a program that has not ended is ended
_TYPE_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# What float32 can represent, without subnormal numbers, which devices may take for 0.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
# int() and float() also take other scripts' digits, 1_0 and spaces.
_PLAIN = re.compile(r"[-+0-9.a-zA-Z]+")
_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d.]")


def flag(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
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
      below: Strict upper bound.
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
    if below is not None:
        limits.append((f"below {below}", lambda value: value < below))
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
        if kind is float and value and not _SMALLEST <= abs(value) <= _LARGEST:
            raise _refusal(field.name, f"0, or {_SMALLEST:g} to {_LARGEST:g} in size", value)
        for rule, keeps in field.metadata["limits"]:
            if not keeps(value):
                raise _refusal(field.name, rule, value)


def numbers(
    name: str,
    text: str,
    *,
    minimum: float,
    maximum: float,
    kind: Callable[[str], N],
) -> list[N]:
    """Parse the value of a text flag that holds numbers, separated by commas.

    Args:
      name: Of the flag, for the error.
      text: Its value.
      minimum: Smallest number allowed.
      maximum: Largest number allowed.
      kind: float, or int for whole numbers.

    Raises:
      InputError: One of them is not allowed.
    """
    words = text.split(",")
    try:
        found = [kind(word) for word in words if _PLAIN.fullmatch(word)]
    except ValueError:
        found = []
    # A comparison with NaN is false.
    if len(found) < len(words) or not all(minimum <= value <= maximum for value in found):
        rule = "whole numbers" if kind is int else "numbers"
        raise InputError(
            f"--{name} must be {rule} from {minimum} to {maximum}, separated by commas, "
            f"got {text!r}"
        )
    return found


def run(config_class: type[Any], main: Callable[[Any], int | None]) -> typing.NoReturn:
    """Build the Config from the command line, call `main` and exit with the status it returns.

    Bad input prints one line to stderr and exits with status 2. Ctrl-C, SIGTERM and SIGHUP print
    one line and exit with 128 plus the signal's number, 130, 143 and 129. Output that cannot
    be written is bad input; where its reader has gone, the program ends as by SIGPIPE, and says
    nothing.

    Args:
      config_class: A frozen dataclass whose fields are made by `flag`.
      main: The program. It returns None or 0 for success, and may raise InputError.
    """
    program = pathlib.Path(sys.argv[0]).stem
    # None in a program that another one calls, whose handlers they are.
    caught = [x for x in experiments.STOP_SIGNALS if signal.getsignal(x) is experiments.end_quietly]
    received: list[int] = []
    try:
        if caught:
            _raise_on_signals(caught, received)
        _configure_logging(main)
        status = _run(config_class, main, program)
        if sys.stdout is not None:
            sys.stdout.flush()
        _end_on_signals(caught)
    except BaseException as error:
        _end_on_signals(caught)
        # What was interrupted may raise another error: XLA's, where Python called from it was.
        if received or isinstance(error, KeyboardInterrupt):
            line, status = "interrupted", 128 + (received or [signal.SIGINT])[0]
        elif isinstance(error, InputError):
            line, status = str(error), 2
        elif isinstance(error, MemoryError):  # NumPy says how many bytes
            line, status = f"out of memory: {str(error) or 'use smaller sizes'}", 2
        elif isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):
            line, status = str(error).splitlines()[0], 2  # JAX's; XLA says how many bytes
        else:
            raise
        print(f"{program}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)


def _raise_on_signals(caught: Sequence[int], received: list[int]) -> None:
    """Raise KeyboardInterrupt on the first of these signals, which is added to `received`.

    Compiled code may hold it up or lose it: after `_GRACE_SECONDS` the process ends in any case,
    but for signals that the training loop takes.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    def watch() -> None:
        while number := int.from_bytes(os.read(reader, 1)):
            if number in caught and signal.getsignal(number) is note:
                time.sleep(_GRACE_SECONDS)
                experiments.end_quietly(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's handlers wait for compiled code to return, a thread that reads this pipe does not.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    for number in caught:
        signal.signal(number, note)


def _end_on_signals(caught: Sequence[int]) -> None:
    """End without a traceback on these signals while Python ends."""
    for number in caught:
        signal.signal(number, experiments.end_quietly)


def _run(config_class: type[Any], main: Callable[[Any], int | None], program: str) -> int | None:
    # Not absl's global flags, which hold those of every imported library.
    values = flags.FlagValues()
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flags.DEFINE_flag(_Flag(field, types[field.name]), values)
    flags.DEFINE_boolean("help", False, "Show this text.", values)
    _parse(values)
    if values["help"].value:
        print(_help(config_class, main, program))
        return 0
    names = [field.name for field in dataclasses.fields(config_class)]
    config = config_class(**{name: values[name].value for name in names})
    validate(config)
    return main(config)


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
            if self._kind in (int, float) and not _PLAIN.fullmatch(str(argument)):
                raise flags.IllegalFlagValueError
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


class _Output(io.FileIO):
    """Standard output, which ends the program where it cannot be written."""

    def write(self, data: Any) -> int:
        """Write all bytes; raise InputError if the system refuses them."""
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            # What is still buffered goes nowhere, or the end of Python would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if isinstance(error, BrokenPipeError):
                sys.exit(128 + signal.SIGPIPE)
            raise InputError(f"standard output cannot be written: {error.strerror}") from error
        return len(data)


class _Log(io.FileIO):
    """Standard error, for which no work is given up: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        """Write all bytes, or some of them."""
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[super().write(left) or 0 :]
        return len(data)


def _configure_streams() -> None:
    """Let programs survive standard streams that are closed, full, or of another encoding."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets this number, and what is printed.
            os.open(os.devnull, os.O_RDONLY)
    encoding = sys.stdout.encoding if sys.stdout else None
    output = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(
        output, encoding, "backslashreplace", line_buffering=output.isatty()
    )
    encoding = sys.stderr.encoding if sys.stderr else None
    log: Any = _Log(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(log, encoding, "backslashreplace", write_through=True)


def _show_unraisable(unraisable: Any) -> None:
    """Show an exception that nothing can catch, but for what the program's own line tells."""
    is_interrupt = issubclass(unraisable.exc_type, KeyboardInterrupt)
    # After a failed save TensorStore still calls the event loop, which is closed by then.
    if not is_interrupt and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


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

    sys.unraisablehook = _show_unraisable
    absl_logging.use_absl_handler()  # which removes other handlers of stderr, so of this stderr
    _configure_streams()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    handler.python_handler.setStream(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(is_wanted)
