"""Counts what an optimised XLA program moves between its device's memory and the chip.

Counted is what every scheduled instruction reads and writes: operands and results, of a slice only
the part that is read or written, loops times their trip count. What lies in a TPU's vector memory
moves nothing. Caches are not modelled: on a GPU all of it counts, what the L2 cache catches too.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[A-Z]\([^)]*\)|\([^)]*\))*))?\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *(
        "opt-barrier",
        "partition-id",
        "replica-id",
        "copy-done",
        "slice-done",
        "async-done",
        "fusion-done",
    ),
}
_SLICES = {"slice", "dynamic-slice", "gather", "slice-start"}
_KERNELS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}
_COLLECTIVE = re.compile(
    "(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    "(?:-start)?"
)
# Groups of one device, in both of the ways that XLA writes them.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
# Custom calls of XLA's own that only name memory.
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes with the padding of its layout; 0 where no memory is kept
    in_memory: bool  # of the device, not of the chip

    @property
    def moved(self) -> int:
        """Bytes that reading or writing all of it moves."""
        return self.size if self.in_memory else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a kernel that is not XLA's, whose traffic the program text does not tell."""

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    calls: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves, and whom it calls."""

    moved: int  # bytes, without those of kernels
    kernels: tuple[KernelCall, ...]


def traffic(text: str) -> Traffic:
    """Counts the traffic of a program.

    Args:
      text: `compiled.as_text()`, of a GPU or a TPU.

    Raises:
      ValueError: a loop's trip count is not to be found.
    """
    computations, entry = parse(text)
    return _computation(computations, computations[entry])


def sent(text: str) -> dict[str, int]:
    """What one device of a program hands over to those it works with, in bytes by the kind.

    Counted are the operands of each `all-reduce`, `all-gather` and so on, loops times their trip
    count, and of a conditional the branch that sends most. How often they go over a wire is the
    network's affair: in a ring of N devices an all-reduce sends 2 (N - 1) / N times its operand.

    Args:
      text: `compiled.as_text()` of any platform.

    Raises:
      ValueError: a loop that sends has a trip count that is not to be found.
    """
    computations, entry = parse(text)
    return _sent(computations, computations[entry])


def _sent(computations: dict[str, Computation], computation: Computation) -> dict[str, int]:
    total: dict[str, int] = {}
    for instruction in computation.values():
        found: dict[str, int] = {}
        times = 1
        if _ALONE.search(instruction.attributes):
            continue
        if kind := _COLLECTIVE.fullmatch(instruction.opcode):
            operands = [computation[name].arrays for name in instruction.operands]
            found = {kind[1]: sum(array.size for arrays in operands for array in arrays)}
        elif instruction.opcode == "while":
            found = _sent(computations, computations[_attribute(instruction, "body")])
            times = _trips(computations, computation, instruction) if found else 1
        elif instruction.opcode == "conditional":
            branches = [_sent(computations, computations[b]) for b in _branches(instruction)]
            found = max(branches, key=lambda branch: sum(branch.values()))
        elif instruction.opcode in ("call", "async-start", "fusion", "fusion-start"):
            name = "to_apply" if instruction.opcode == "call" else "calls"
            found = _sent(computations, computations[_attribute(instruction, name)])
        for name, size in found.items():
            total[name] = total.get(name, 0) + times * size
    return total


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Every computation of a program by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _instruction(found[1], found[2], "ROOT " in line[:12])
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, rest = text[end:].strip().split("(", 1)
    rest = "(" + rest
    close = _closing(rest)
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_arrays(text[:end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:close])),
        attributes=rest if opcode in ("constant", "parameter") else rest[close:],
        is_root=is_root,
    )


def _closing(text: str) -> int:
    """Where the parenthesis that the text begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position + 1
    raise ValueError(f"hlo: unbalanced parentheses in {text[:80]!r}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape, order, tiles in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" else int("".join(re.findall(r"^[a-z]+(\d+)", dtype)) or 0)
        sizes = [int(size) for size in shape.split(",") if size]
        # From the slowest to the fastest axis, the last ones filled up to whole tiles.
        physical = [sizes[int(axis)] for axis in reversed(order.split(","))] if order else sizes
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        unit = [int(size) for size in tile[1].split(",")] if tile else []
        space = re.search(r"S\((\d+)\)", tiles)
        yield Array(
            dtype=dtype,
            shape=tuple(sizes),
            size=_padded(physical, unit) * bits // 8,
            in_memory=space is None or space[1] == "0",
        )


def _padded(shape: Sequence[int], tile: Sequence[int]) -> int:
    """Elements of an array whose last axes are filled up to whole tiles."""
    axes = min(len(shape), len(tile))
    whole, cut = shape[: len(shape) - axes], shape[len(shape) - axes :]
    units = tile[len(tile) - axes :]
    return math.prod(whole) * math.prod(
        -(-size // unit) * unit for size, unit in zip(cut, units, strict=True)
    )


def tiled_size(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a TPU's array in the layout of a kernel's operands, its last axes in tiles."""
    return _padded(shape, (32 // itemsize, 128)) * itemsize


def _computation(computations: dict[str, Computation], computation: Computation) -> Traffic:
    moved = 0
    kernels: list[KernelCall] = []
    for instruction in computation.values():
        inner, calls = _called(computations, computation, instruction)
        if inner is not None:
            moved += calls * inner.moved
            kernels += [
                dataclasses.replace(kernel, calls=calls * kernel.calls) for kernel in inner.kernels
            ]
        elif _target(instruction) in _KERNELS:
            operands = tuple(a for name in instruction.operands for a in computation[name].arrays)
            kernels.append(KernelCall(operands, instruction.arrays, 1))
        else:
            moved += _moved(computations, computation, instruction)
    return Traffic(moved, tuple(kernels))


def _called(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> tuple[Traffic | None, int]:
    """The traffic of a loop's body, of a branch or of a called computation, and how often."""
    if instruction.opcode == "while":
        body = _computation(computations, computations[_attribute(instruction, "body")])
        return body, _trips(computations, computation, instruction)
    if instruction.opcode == "conditional":
        counted = [
            _computation(computations, computations[name]) for name in _branches(instruction)
        ]
        return max(counted, key=lambda branch: branch.moved), 1
    if instruction.opcode in ("call", "async-start"):
        name = "to_apply" if instruction.opcode == "call" else "calls"
        return _computation(computations, computations[_attribute(instruction, name)]), 1
    return None, 0


def _branches(conditional: Instruction) -> list[str]:
    names = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if names:
        return [name.strip("%") for name in names[1].split(", ")]
    return [_attribute(conditional, f"{branch}_computation") for branch in ("true", "false")]


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"hlo: {instruction.opcode} {instruction.name} has no {name}")
    return found[1]


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes[:2000])
    return found[1] if found and instruction.opcode == "custom-call" else ""


def _trips(
    computations: dict[str, Computation], computation: Computation, loop: Instruction
) -> int:
    """How often a loop runs that counts up from zero by ones, as those of `jax.lax.scan` do."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = computations[_attribute(loop, "condition")]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
        bound = condition[root.operands[1]]
        if bound.opcode == "get-tuple-element":  # moved out of the loop
            index = int(_attribute(bound, "index"))
            bound = computation[computation[loop.operands[0]].operands[index]]
        while bound.opcode == "copy":
            bound = computation[bound.operands[0]]
        if bound.opcode == "constant":
            return int(re.match(r"\((\d+)\)", bound.attributes)[1])  # type: ignore[index]
    raise ValueError(f"hlo: how often does {loop.name} run? Its condition ends in {root}")


def _moved(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> int:
    """What an instruction that calls no other computation, or a fusion, reads and writes."""
    if instruction.opcode in _FREE or _target(instruction) in _FREE_CALLS:
        return 0
    operands = [computation[name].arrays for name in instruction.operands]
    if instruction.opcode == "copy-start":  # its type also holds its operand
        return instruction.arrays[0].moved + _all(operands[0])
    if instruction.opcode == "slice-start":
        result = instruction.arrays[1]
        return result.moved + (result.size if operands[0][0].in_memory else 0)
    results = instruction.arrays
    if instruction.opcode in ("fusion", "fusion-start"):
        fused = computations[_attribute(instruction, "calls")]
        reads, written = _fusion(computations, fused)
        if instruction.opcode == "fusion-start":  # its type also holds its operands, and a context
            first = sum(map(len, operands))
            results = results[first : first + len(written)]
    else:
        reads, written = _reads(instruction, operands), _written(computation, instruction)
    pairs = [
        *zip(map(_all, operands), reads, strict=True),
        *zip((array.moved for array in results), written, strict=True),
    ]
    return round(sum(min(moved, limit) for moved, limit in pairs))


def _all(arrays: Sequence[Array]) -> int:
    return sum(array.moved for array in arrays)


def _reads(instruction: Instruction, operands: Sequence[Sequence[Array]]) -> list[float]:
    """The most that one instruction reads of each operand, in bytes."""
    result = sum(array.size for array in instruction.arrays)
    if instruction.opcode in _SLICES:
        return [result, *(math.inf for _ in operands[1:])]
    if instruction.opcode == "dynamic-update-slice":  # in place: what it does not write stays
        return [0, *(math.inf for _ in operands[1:])]
    return [math.inf] * len(operands)


def _written(computation: Computation, instruction: Instruction) -> list[float]:
    """The most that one instruction writes of each result, in bytes."""
    if instruction.opcode == "dynamic-update-slice":
        return [sum(array.size for array in computation[instruction.operands[1]].arrays)]
    return [math.inf] * len(instruction.arrays)


def _fusion(
    computations: dict[str, Computation], fused: Computation
) -> tuple[list[float], list[float]]:
    """The most that a fusion reads of each operand and writes of each result, in bytes."""
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for instruction in fused.values():
        for position, name in enumerate(instruction.operands):
            users.setdefault(name, []).append((instruction, position))

    def read(name: str) -> float:
        total = 0.0
        for user, position in users.get(name, []):
            if user.opcode == "bitcast":
                total += read(user.name)
            elif user.opcode == "fusion":
                total += _fusion(computations, computations[_attribute(user, "calls")])[0][position]
            else:
                arrays = [fused[operand].arrays for operand in user.operands]
                total += _reads(user, arrays)[position]
        return total

    parameters = sorted(
        (int(re.match(r"\((\d+)\)", i.attributes)[1]), i.name)  # type: ignore[index]
        for i in fused.values()
        if i.opcode == "parameter"
    )
    root = next(instruction for instruction in fused.values() if instruction.is_root)
    return [read(name) for _, name in parameters], _results(fused, root)


def _results(fused: Computation, root: Instruction) -> list[float]:
    if root.opcode == "bitcast":
        return _results(fused, fused[root.operands[0]])
    if root.opcode == "tuple":
        return [size for name in root.operands for size in _results(fused, fused[name])]
    return _written(fused, root)
