"""Count the iterations of the loops in PTX by executing the instructions that control them.

A kernel's loops are run by one thread of a few blocks. Only branches and the instructions that
their predicates depend on are executed, so nothing is computed from the contents of arrays: a loop
whose trip count depends on them is an error.

Source: NVIDIA, "PTX ISA", https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

import collections
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.compilers.loops import Code, analyse

# More iterations of branches than any kernel of this project has.
_MAX_STEPS = 50_000_000
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": lambda x, y: x << min(y, 64),
    "shr": lambda x, y: x >> min(y, 64),
    "div": lambda x, y: int(math.copysign(abs(x) // abs(y), x * y)) if y else 0,
    "rem": lambda x, y: int(math.copysign(abs(x) % abs(y), x)) if y else 0,
}
_TYPE = re.compile(r"[subf](8|16|32|64)|pred")


class Instruction(NamedTuple):
    """An instruction of PTX."""

    guard: tuple[str, bool] | None  # predicate, and the value for which it executes
    opcode: str
    operands: tuple[str, ...]


class Kernel(NamedTuple):
    """An entry function."""

    name: str
    threads: int  # a block
    instructions: tuple[Instruction, ...]
    jumps: Mapping[int, tuple[int, ...]]  # where the code continues after an instruction
    code: Code


def parse(text: str) -> list[Kernel]:
    """Parse the entry functions of a PTX module."""
    found = []
    for part in re.split(r"\.entry\s+", text)[1:]:
        head, _, body = part.partition(")")
        name = re.match(r"[\w$]+", head)[0]  # type: ignore[index]
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", body)
        if not threads:
            raise ValueError(f"ptx: {name} does not declare the threads of a block")
        instructions, labels = _statements(body)
        sizes = (int(size or 1) for size in threads.groups())
        jumps = _jumps(instructions, labels)
        code = analyse(len(instructions), jumps)
        found.append(Kernel(name, math.prod(sizes), instructions, jumps, code))
    return found


def trips(kernel: Kernel, grid: Sequence[int]) -> list[int]:
    """Count the iterations of each loop in one execution, those of enclosing loops included.

    The first thread of the first and of the last block along each axis of the grid is executed. Of
    a loop whose iterations differ, the largest count is kept.

    Raises:
      ValueError: The trip count of a loop depends on the contents of arrays.
    """
    code = kernel.code
    if not code.loops:
        return []
    most: collections.Counter[int] = collections.Counter()
    undecided = False
    for block in itertools.product(*(sorted({0, size - 1}) for size in grid)):
        counts, skipped = _execute(kernel, grid, block)
        most |= counts
        undecided |= skipped
    if undecided and not all(most[loop.head] for loop in code.loops):
        raise ValueError(f"ptx: whether a loop of {kernel.name} runs depends on array contents")
    return [most[loop.head] for loop in code.loops]


def _statements(body: str) -> tuple[tuple[Instruction, ...], dict[str, list[int]]]:
    instructions: list[Instruction] = []
    labels: dict[str, list[int]] = {}
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.DOTALL)
    for statement in re.split(r";|^\s*[{}]\s*$", body, flags=re.MULTILINE):
        statement = " ".join(statement.split()).lstrip("{} ")
        while label := re.match(r"([\w$]+):\s*", statement):
            labels.setdefault(label[1], []).append(len(instructions))
            statement = statement[label.end() :].lstrip("{} ")
        found = re.fullmatch(r"(?:@(!?)([%\w$]+) )?([a-z][\w.:]*)(?: (.*))?", statement)
        if found:
            guard = (found[2], not found[1]) if found[2] else None
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", found[4] or "")
            instructions.append(Instruction(guard, found[3], tuple(operands)))
    return tuple(instructions), labels


def _jumps(
    instructions: Sequence[Instruction], labels: Mapping[str, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """Return where the code continues after each jump."""
    writers: dict[str, set[str]] = collections.defaultdict(set)
    for instruction in instructions:
        for register in _written(instruction):
            writers[register].add(instruction.opcode.split(".")[0])
    jumps: dict[int, tuple[int, ...]] = {}
    for position, (guard, opcode, operands) in enumerate(instructions):
        after = (position + 1,) if guard else ()
        if opcode.split(".")[0] in ("ret", "exit", "trap"):
            jumps[position] = after
        elif opcode.split(".")[0] == "bra":
            if guard and writers[guard[0]] == {"mbarrier"}:
                continue  # as if no barrier in memory was ever waited for
            # Inline assembly repeats its labels.
            places = labels[operands[0]]
            place = places[0] if len(places) == 1 else max(p for p in places if p <= position)
            jumps[position] = (*after, place)
    return jumps


def _written(instruction: Instruction) -> list[str]:
    """Return the registers that an instruction writes."""
    kind = instruction.opcode.split(".")[0]
    if kind in ("bra", "st", "ret", "exit", "bar", "red") or not instruction.operands:
        return []
    both = kind in ("setp", "shfl")  # may write a second register, after a bar
    return re.findall(r"%?[\w$]+", instruction.operands[0]) + list(
        instruction.operands[1:2] if both and instruction.operands[1].startswith("%p") else ()
    )


def _control(kernel: Kernel) -> list[int]:
    """Return the positions of branches, exits and all instructions that they depend on."""
    writers = collections.defaultdict(list)
    for position, instruction in enumerate(kernel.instructions):
        for register in _written(instruction):
            writers[register].append(position)
    found = {
        position
        for position, instruction in enumerate(kernel.instructions)
        if position in kernel.jumps
    }
    todo = list(found)
    while todo:
        instruction = kernel.instructions[todo.pop()]
        read = [instruction.guard[0]] if instruction.guard else []
        read += [register for x in instruction.operands for register in re.findall(r"%\w+", x)]
        for register in read:
            for position in writers[register]:
                if position not in found:
                    found.add(position)
                    todo.append(position)
    return sorted(found)


def _execute(
    kernel: Kernel, grid: Sequence[int], block: Sequence[int]
) -> tuple[collections.Counter[int], bool]:
    """Execute the control flow of the first thread of a block.

    Returns:
      The executions of each target of a backward branch, and whether a forward branch depended on
      the contents of arrays; it is then not taken.
    """
    values: dict[str, int | None] = collections.defaultdict(lambda: None)
    values |= {f"%ctaid.{axis}": index for axis, index in zip("xyz", block, strict=False)}
    values |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=False)}
    values |= {f"%tid.{axis}": 0 for axis in "xyz"} | {"%laneid": 0, "%warpid": 0}
    values["%ntid.x"] = kernel.threads
    control = _control(kernel)
    # Of a jump to any instruction, the next one in `control` is executed.
    following = {position: k for k, position in enumerate(control)}
    for position in range(len(kernel.instructions) - 1, -1, -1):
        following.setdefault(position, following.get(position + 1, len(control)))
    entered = collections.defaultdict(list)
    for loop in kernel.code.loops:
        entered[following[loop.head]].append(loop.head)
    counts: collections.Counter[int] = collections.Counter()
    undecided, k = False, 0
    for _ in range(_MAX_STEPS):
        if k >= len(control):
            return counts, undecided
        for start in entered[k]:
            counts[start] += 1
        position = control[k]
        instruction = kernel.instructions[position]
        holds: bool | None = True
        if instruction.guard:
            name, wanted = instruction.guard
            value = values[name]
            holds = None if value is None else bool(value) == wanted
        k += 1
        if position in kernel.jumps:
            # A jump without target ends the code.
            target = (*kernel.jumps[position], len(kernel.instructions))[bool(instruction.guard)]
            if holds is None and target <= position:
                raise ValueError(f"ptx: a trip count in {kernel.name} depends on array contents")
            undecided |= holds is None
            if holds:
                k = following.get(target, len(control))
            continue
        if holds is None:
            values.update(dict.fromkeys(_written(instruction)))
        elif holds:
            result = _evaluate(instruction, values)
            first, *others = _written(instruction)
            values.update({first: result, **dict.fromkeys(others)})
    raise ValueError(f"ptx: {kernel.name} executes more than {_MAX_STEPS} instructions of control")


def _evaluate(instruction: Instruction, values: Mapping[str, int | None]) -> int | None:
    """Return the value that an instruction writes; None if it is unknown."""
    kind, *modifiers = instruction.opcode.split(".")
    types = [modifier for modifier in modifiers if _TYPE.fullmatch(modifier)]
    if instruction.opcode.startswith("ld.param"):  # every parameter is the address of an array
        return (1 + int(re.search(r"(\d+)\]", instruction.operands[1])[1])) << 40  # type: ignore[index]
    if not types or types[0][0] == "f":
        return None
    given = [_read(name, types[-1], values) for name in instruction.operands[1:]]
    if kind == "selp":
        chosen = values[instruction.operands[3]]
        return None if chosen is None else given[0 if chosen else 1]
    if kind == "and" and 0 in given:
        return 0
    if any(value is None for value in given):
        return None
    x, *others = (value for value in given if value is not None)
    if kind in ("mov", "cvt", "cvta") or instruction.opcode.startswith("shfl.sync.idx"):
        return _wrap(x, types[0])
    if kind == "not":
        return int(not x) if types[0] == "pred" else _wrap(~x, types[0])
    if kind == "neg":
        return _wrap(-x, types[0])
    if kind == "setp" and len(others) == 1:
        compare = _COMPARISONS.get(modifiers[0])
        return None if compare is None else int(compare(x, others[0]))
    if kind == "bfe" and len(others) == 2 and types[0][0] == "u":
        return x >> others[0] & 2 ** others[1] - 1
    if kind in ("mul", "mad"):
        if "hi" in modifiers:
            return _wrap(x * others[0] >> int(types[0][1:]), types[0]) if kind == "mul" else None
        product = x * others[0] + (others[1] if kind == "mad" else 0)
        wide = "wide" in modifiers
        return _wrap(product, types[0][0] + str(2 * int(types[0][1:])) if wide else types[0])
    if kind in _BINARY and len(others) == 1:
        return _wrap(_BINARY[kind](x, others[0]), types[0])
    return None


def _read(operand: str, kind: str, values: Mapping[str, int | None]) -> int | None:
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        return _wrap(int(operand.rstrip("U"), 0), kind)
    value = values[operand]
    return None if value is None else _wrap(value, kind)


def _wrap(value: int, kind: str) -> int:
    """Return a value as an integer of a PTX type."""
    if kind == "pred":
        return value & 1
    bits = int(kind[1:])
    value &= 2**bits - 1
    return value - 2**bits if kind[0] == "s" and value >> (bits - 1) else value
