"""Find the instructions of a compiled TPU program that share machine code.

The compiler generates, and dumps, the code of equal instructions once. Two are equal if their text
is, apart from names and metadata: the types of operands and results, with layouts and memory
spaces, the attributes, and the computations that they call.
"""

import functools
import re

_METADATA = re.compile(r", metadata=\{(?:[^{}\"]|\"[^\"]*\"|\{[^{}]*\})*\}")
_NAME = re.compile(r"%[\w.\-]+")


def code_by_instruction(text: str) -> dict[str, str]:
    """Return a description of the code of each instruction, by its name.

    Args:
      text: `compiled.as_text()` for a TPU.
    """
    computations: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current = computations[header[1]] = {}
        elif found := re.match(r"\s*(ROOT )?%([\w.\-]+) = (.*)", line):
            current[found[2]] = (found[1] or "") + _METADATA.sub("", found[3])

    @functools.cache
    def inside(computation: str) -> str:
        numbers: dict[str, int] = {}

        def renamed(match: re.Match[str]) -> str:
            name = match[0][1:]
            if name in computations:
                return inside(name)
            return f"%{numbers.setdefault(name, len(numbers))}"

        lines = computations[computation].items()
        return (
            "{" + "; ".join(_NAME.sub(renamed, f"%{name} = {rest}") for name, rest in lines) + "}"
        )

    def described(own: dict[str, str], rest: str) -> str:
        def replaced(match: re.Match[str]) -> str:
            name = match[0][1:]
            if name in computations:
                return inside(name)
            return _type(own[name]) if name in own else match[0]

        return _NAME.sub(replaced, rest.removeprefix("ROOT "))

    return {
        name: described(own, rest) for own in computations.values() for name, rest in own.items()
    }


def _type(rest: str) -> str:
    """Return the type at the start of an instruction's text."""
    depth = 0
    for position, character in enumerate(rest.removeprefix("ROOT ")):
        depth += (character in "({[") - (character in ")}]")
        if character == " " and not depth:
            return rest.removeprefix("ROOT ")[:position]
    raise ValueError(f"duplicates: no type in {rest[:80]!r}")
