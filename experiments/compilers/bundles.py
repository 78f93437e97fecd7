"""Count the bundles that a TPU kernel executes, from the compiler's dump of its machine code.

A bundle is a VLIW instruction word; it takes a cycle unless it stalls. The scalar instructions that
control branches are executed, so loops count with their iterations and skipped regions do not
count. Scalars that are read from memory are unknown unless the code has written them.
"""

import collections
import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.compilers.loops import Code, analyse

_MAX_STEPS = 20_000_000
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{", re.MULTILINE)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(
    r"%(\w+) = ([\w.]+)(?: \((!?%\w+)(?:, (%\w+))?\))?,? ?(?:\[resolvable:\S+\] )?(.*)"
)
# A store has its value after the place, a load perhaps a predicate under which it executes.
_SPILL = re.compile(r"\[smem:\[#(\w+_spill)\]\] ?(?:(%\w+)|\((!?%\w+)\))?")
_CORE = re.compile(r"%(\w+) = sld [^;]*/\* core id \*/")
_MASK = 2**32 - 1
_BINARY: dict[str, Callable[[int, int], int]] = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smul.s32": operator.mul,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda x, y: x << (y & 31),
    "sshrl.u32": lambda x, y: (x & _MASK) >> (y & 31),
    "sshra.s32": lambda x, y: x >> (y & 31),
    "smin.s32": min,
    "smax.s32": max,
    "scmp.lt.s32.totalorder": operator.lt,
    "scmp.le.s32.totalorder": operator.le,
    "scmp.gt.s32.totalorder": operator.gt,
    "scmp.ge.s32.totalorder": operator.ge,
    "scmp.eq.s32.totalorder": operator.eq,
    "scmp.ne.s32.totalorder": operator.ne,
    "scmp.lt.u32.totalorder": lambda x, y: (x & _MASK) < (y & _MASK),
    "scmp.le.u32.totalorder": lambda x, y: (x & _MASK) <= (y & _MASK),
    "scmp.gt.u32.totalorder": lambda x, y: (x & _MASK) > (y & _MASK),
    "scmp.ge.u32.totalorder": lambda x, y: (x & _MASK) >= (y & _MASK),
    "por": lambda x, y: x | y,
    "pand": lambda x, y: x & y,
    "pnor": lambda x, y: 1 - (x | y),
    "pnand": lambda x, y: 1 - (x & y),
    "pxor": operator.xor,
}


class Scalar(NamedTuple):
    """A scalar instruction. A name such as `s28_s17` is that of a value, and of its register."""

    opcode: str
    target: str
    guard: str | None  # predicate under which it executes; "!" negates it
    otherwise: str | None  # value for a predicate under which it does not
    operands: tuple[str, ...]


class Branch(NamedTuple):
    """A branch to a bundle."""

    guard: str | None  # predicate under which it is taken; "!" negates it
    target: int | None  # None if the dump does not mark it


class Kernel(NamedTuple):
    """The bundles of a kernel."""

    scalars: tuple[tuple[Scalar, ...], ...]  # of each bundle
    branches: dict[int, Branch]  # by the bundle after which they take effect
    code: Code


class Executed(NamedTuple):
    """The bundles that a kernel executes."""

    total: int
    loops: tuple[tuple[int, int], ...]  # iterations and bundles of each, inner loops excepted


def parse(text: str, delay: int) -> Kernel:
    """Parse the dump of a kernel's final bundles.

    Args:
      text: The dump.
      delay: Bundles after a branch that are executed before its target.
    """
    found = _BUNDLE.split(text)[1:]
    regions = {
        int(region): position
        for position, bundle in enumerate(found)
        for region in _REGION.findall(bundle)
    }
    scalars: list[tuple[Scalar, ...]] = []
    branches: dict[int, Branch] = {}
    for position, bundle in enumerate(found):
        own = []
        cores = _CORE.findall(bundle)
        # Comments may contain newlines and braces.
        for statement in re.sub(r"/\*.*?\*/", "", bundle, flags=re.DOTALL).split(";;"):
            parsed = _INSTRUCTION.match(" ".join(statement.replace("}", "").split()))
            if not parsed:
                continue
            name, opcode, guard, otherwise, rest = parsed.groups()
            if opcode.startswith("sbr"):
                region = re.search(r"target = \$region(\d+)", rest)
                end = min(position + delay, len(found) - 1)
                branches[end] = Branch(guard, regions.get(int(region[1])) if region else None)
                if guard:  # its value is read now
                    own.append(Scalar("smov", f"b{end}", None, None, (guard.lstrip("!"),)))
            elif name in cores:  # the first of two cores that share the work
                own.append(Scalar("smov", name, None, None, ("0",)))
            elif stored := _SPILL.fullmatch(rest):
                place, source = (stored[1], stored[2]) if stored[2] else (name, stored[1])
                own.append(Scalar("smov", place, guard or stored[3], otherwise, (source,)))
            elif re.search(r"_[sp]\d+$", name):
                operands = tuple(x.strip() for x in rest.split(","))
                own.append(Scalar(opcode, name, guard, otherwise, operands))
        scalars.append(tuple(own))
    jumps = {
        end: tuple(
            place
            for place in (end + 1 if branch.guard else None, branch.target)
            if place is not None
        )
        for end, branch in branches.items()
    }
    return Kernel(tuple(scalars), branches, analyse(len(found), jumps))


def execute(kernel: Kernel) -> Executed:
    """Execute the control flow of a kernel, and count its bundles.

    Of a branch that depends on unknown values, the fallthrough is executed.

    Raises:
      ValueError: A backward branch depends on an unknown value, or the target of a branch is
        unknown.
    """
    needed = _needed(kernel)
    active = [
        # The operands and the result of a phi are one register.
        tuple(x for x in bundle if x.target in needed and x.opcode != "sphi")
        for bundle in kernel.scalars
    ]
    size = len(active)
    heads = {loop.head for loop in kernel.code.loops}
    # Bundles up to the next one where something happens are executed together.
    following = [0] * size
    nearest = size
    for position in range(size - 1, -1, -1):
        following[position] = nearest
        if active[position] or position in heads or position - 1 in kernel.branches:
            nearest = position
    values: dict[str, int | None] = collections.defaultdict(lambda: None)
    visits = [0] * size  # of the group of bundles that starts here
    position = 0
    for _ in range(_MAX_STEPS):
        if position >= size:
            return _totals(kernel, visits, following)
        visits[position] += 1
        updates = [(_register(x.target), _evaluate(x, values)) for x in active[position]]
        values.update(updates)
        last = following[position] - 1
        position = last + 1
        if branch := kernel.branches.get(last):
            taken: bool | None = True
            if branch.guard:
                value = values[f"b{last}"]
                taken = None if value is None else bool(value) != branch.guard.startswith("!")
            if taken is None and branch.target is not None and branch.target <= last:
                raise ValueError("bundles: the iterations of a loop depend on an unknown value")
            if taken:
                if branch.target is None:
                    raise ValueError("bundles: the target of a branch is unknown")
                position = branch.target
    raise ValueError(f"bundles: more than {_MAX_STEPS} steps")


def _totals(kernel: Kernel, visits: Sequence[int], following: Sequence[int]) -> Executed:
    executed = [0] * len(visits)
    for position, times in enumerate(visits):
        if times:
            for inside in range(position, following[position]):
                executed[inside] += times
    loops = tuple(
        (executed[loop.head], sum(executed[position] for position in loop.own))
        for loop in kernel.code.loops
    )
    return Executed(sum(executed), loops)


def _needed(kernel: Kernel) -> set[str]:
    """Return the names of the values that branches depend on."""
    sources: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for bundle in kernel.scalars:
        for scalar in bundle:
            for text in (*scalar.operands, scalar.guard, scalar.otherwise):
                sources[scalar.target] |= set(re.findall(r"%(\w+)|^(?=\w+_spill)(\w+)", text or ""))
    needed = {f"b{end}" for end in kernel.branches}
    todo = list(needed)
    while todo:
        fresh = {name for pair in sources[todo.pop()] for name in pair if name} - needed
        needed |= fresh
        todo += fresh
    return needed


def _evaluate(scalar: Scalar, values: dict[str, int | None]) -> int | None:
    if not scalar.guard:
        return _result(scalar, values)
    predicate = _read(scalar.guard, values)
    before = values[_register(scalar.otherwise or scalar.target)]
    if predicate == 0:
        return before
    result = _result(scalar, values)
    return result if predicate or result == before else None


def _result(scalar: Scalar, values: dict[str, int | None]) -> int | None:
    given = [_read(operand, values) for operand in scalar.operands]
    if scalar.opcode == "scalar_select":
        return None if given[0] is None else given[1 if given[0] else 2]
    if None in given:
        # One operand may decide.
        if 0 in given and scalar.opcode in ("sand.u32", "pand", "pnand"):
            return int(scalar.opcode == "pnand")
        return 1 if 1 in given and scalar.opcode == "por" else None
    x, *others = (value for value in given if value is not None)
    if scalar.opcode in ("smov", "pmov") or scalar.opcode.startswith("int_to_ptr"):
        return x
    if scalar.opcode == "pneg":
        return 1 - x
    if scalar.opcode in _BINARY and len(others) == 1:
        result = int(_BINARY[scalar.opcode](x, others[0])) & _MASK
        return result - 2**32 if result >> 31 else result
    return None


@functools.cache
def _register(name: str) -> str:
    """Return the register of a value; the name itself for the place of a spilled one."""
    found = re.fullmatch(r"%?\w*_([sp]\d+)", name)
    return found[1] if found else name


def _read(operand: str, values: dict[str, int | None]) -> int | None:
    if operand[0] == "!":
        value = values[_register(operand[1:])]
        return None if value is None else 1 - value
    if operand[0] not in "-0123456789":
        return values[_register(operand)]
    value = int(operand) & _MASK if re.fullmatch(r"-?\d+", operand) else None
    return None if value is None else value - 2**32 if value >> 31 else value
