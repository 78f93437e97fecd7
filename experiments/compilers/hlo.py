"""Count the memory traffic and the communication of a compiled XLA program from its text.

Traffic is the sum of the operands read and the results written by all scheduled instructions. Of a
slice, only the part read or written counts; the body of a loop counts times its trip count. Arrays
in a TPU's vector memory cause no traffic. Caches are not modelled, so on a GPU the traffic includes
accesses that hit the L2 cache.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[A-Z]\([^)]*\)|\([^)]*\))*))?\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)")
# Opcodes without traffic of their own.
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
# Replica groups of one device each, in XLA's two notations.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# XLA's own custom calls without traffic.
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the result type of an instruction."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes with the padding of its layout; 0 for a token
    in_memory: bool  # in the device's memory, not in the vector memory of the chip

    @property
    def moved(self) -> int:
        """Traffic in bytes of reading or writing the whole array."""
        return self.size if self.in_memory else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its result, or results if it is a tuple
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """The call of a Pallas kernel, whose traffic cannot be read from the program text."""

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    calls: int  # by the program, loops included
    handed: int = 0  # bytes of the results that a reduction or another kernel reads


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, or a call of a Pallas kernel, that the program executes."""

    name: str
    calls: int  # by the program, loops included
    moved: int  # bytes of one call, without the traffic of a kernel
    kernel: KernelCall | None
    product: int = 0  # operations of a library's matrix product, of one call
    dtype: str = ""  # of its operands


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of a program's own instructions, and the kernels that it calls."""

    moved: int  # bytes, without the traffic of kernels
    kernels: tuple[KernelCall, ...]


def traffic(text: str) -> Traffic:
    """Count the traffic of a program.

    Args:
      text: `compiled.as_text()` for a GPU or a TPU.

    Raises:
      ValueError: The trip count of a loop is unknown.
    """
    found = executed(text)
    kernels = (dataclasses.replace(e.kernel, calls=e.calls) for e in found if e.kernel)
    return Traffic(sum(e.calls * e.moved for e in found), tuple(kernels))


def executed(text: str) -> list[Executed]:
    """List the instructions that a program executes, those of loops and branches included.

    Of a conditional, the branch with the larger traffic is listed. Arguments and errors are those
    of `traffic`.
    """
    computations, entry = parse(text)
    return _computation(computations, computations[entry])


def sent(text: str) -> dict[str, int]:
    """Count the bytes that one device passes to collectives, by the kind of collective.

    The count sums the operands of each `all-reduce`, `all-gather` and so on, with the body of a
    loop times its trip count, and the larger branch of a conditional. The bytes on a wire depend
    on the algorithm: in a ring of N devices, an all-reduce sends 2 (N - 1) / N times its operand.

    Args:
      text: `compiled.as_text()` for any platform.

    Raises:
      ValueError: The trip count of a loop with a collective is unknown.
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
    """Parse the computations of a program; return them by name, and the name of the entry."""
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
    """Return the position after the parenthesis that closes the one at the start of the text."""
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
        # The layout lists axes from the fastest to the slowest; tiles pad the fastest ones.
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
    """Count the elements of an array whose last axes are padded to whole tiles."""
    axes = min(len(shape), len(tile))
    whole, cut = shape[: len(shape) - axes], shape[len(shape) - axes :]
    units = tile[len(tile) - axes :]
    return math.prod(whole) * math.prod(
        -(-size // unit) * unit for size, unit in zip(cut, units, strict=True)
    )


def tiled_size(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of an array in the tiled layout of a TPU kernel's operands."""
    return _padded(shape, (32 // itemsize, 128)) * itemsize


def _computation(computations: dict[str, Computation], computation: Computation) -> list[Executed]:
    found: list[Executed] = []
    for instruction in computation.values():
        if (inner := _called(computations, computation, instruction)) is not None:
            found += inner
        elif _target(instruction) in _KERNELS:
            operands = tuple(a for name in instruction.operands for a in computation[name].arrays)
            handed = _handed(computations, computation, instruction)
            kernel = KernelCall(operands, instruction.arrays, 1, handed)
            found.append(Executed(instruction.name, 1, 0, kernel))
        else:
            moved = _moved(computations, computation, instruction)
            product = _library_product(computation, instruction)
            found.append(Executed(instruction.name, 1, moved, None, *product))
    return found


def _library_product(computation: Computation, instruction: Instruction) -> tuple[int, str]:
    """Return the operations of a matrix product by cuBLAS, and the dtype of its operands."""
    if not _target(instruction).startswith("__cublas$"):
        return 0, ""
    left = computation[instruction.operands[0]].arrays[0]
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if not axes:
        raise ValueError(f"hlo: {instruction.name} has no dimension numbers")
    depth = math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return 2 * depth * math.prod(instruction.arrays[0].shape), left.dtype


def _handed(
    computations: dict[str, Computation], computation: Computation, kernel: Instruction
) -> int:
    """Return the bytes of a kernel's results that a reduction or another kernel reads."""

    def is_read(name: str) -> bool:
        for user in computation.values():
            if name not in user.operands:
                continue
            if user.opcode in ("bitcast", "copy") and is_read(user.name):
                return True
            if _target(user) in _KERNELS or user.opcode == "reduce":
                return True
            if user.opcode.startswith("fusion"):
                fused = computations[_attribute(user, "calls")]
                if any(inner.opcode == "reduce" for inner in fused.values()):
                    return True
        return False

    if len(kernel.arrays) == 1:
        return kernel.arrays[0].size if is_read(kernel.name) else 0
    return sum(
        kernel.arrays[int(_attribute(user, "index"))].size
        for user in computation.values()
        if user.opcode == "get-tuple-element"
        and kernel.name in user.operands
        and is_read(user.name)
    )


def _called(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> list[Executed] | None:
    """Return what a loop, conditional or call executes; None for any other instruction."""

    def inside(name: str, times: int = 1) -> list[Executed]:
        inner = _computation(computations, computations[name])
        return [dataclasses.replace(e, calls=times * e.calls) for e in inner]

    if instruction.opcode == "while":
        times = _trips(computations, computation, instruction)
        found = inside(_attribute(instruction, "body"), times)
        # XLA does not evaluate the condition of a loop whose trip count it knows.
        tests = 0 if _KNOWN_TRIPS.search(instruction.attributes) else times + 1
        condition = inside(_attribute(instruction, "condition"), tests)
        return found + [dataclasses.replace(test, moved=0) for test in condition]  # scalars
    if instruction.opcode == "conditional":
        counted = [inside(name) for name in _branches(instruction)]
        return max(counted, key=lambda branch: sum(e.calls * e.moved for e in branch))
    if instruction.opcode in ("call", "async-start"):
        return inside(
            _attribute(instruction, "to_apply" if instruction.opcode == "call" else "calls")
        )
    return None


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
    """Return the trip count of a loop that counts from zero in steps of one, like `lax.scan`."""
    if known := _KNOWN_TRIPS.search(loop.attributes):
        return int(known[1])
    condition = computations[_attribute(loop, "condition")]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
        bound = condition[root.operands[1]]
        if bound.opcode == "get-tuple-element":  # the loop carries its bound
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
    """Return the traffic of a fusion, or of an instruction that calls no computation."""
    if instruction.opcode in _FREE or _target(instruction) in _FREE_CALLS:
        return 0
    operands = [computation[name].arrays for name in instruction.operands]
    if instruction.opcode == "copy-start":  # its type includes its operand
        return instruction.arrays[0].moved + _all(operands[0])
    if instruction.opcode == "slice-start":
        result = instruction.arrays[1]
        return result.moved + (result.size if operands[0][0].in_memory else 0)
    results = instruction.arrays
    if instruction.opcode in ("fusion", "fusion-start"):
        fused = computations[_attribute(instruction, "calls")]
        reads, written = _fusion(computations, fused)
        if instruction.opcode == "fusion-start":  # its type: operands, results, a context
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
    """Return upper bounds on the bytes that an instruction reads of each operand."""
    result = sum(array.size for array in instruction.arrays)
    if instruction.opcode in _SLICES:
        return [result, *(math.inf for _ in operands[1:])]
    if instruction.opcode == "dynamic-update-slice":  # in place: reads nothing of operand 0
        return [0, *(math.inf for _ in operands[1:])]
    return [math.inf] * len(operands)


def _written(computation: Computation, instruction: Instruction) -> list[float]:
    """Return upper bounds on the bytes that an instruction writes of each result."""
    if instruction.opcode == "dynamic-update-slice":
        return [sum(array.size for array in computation[instruction.operands[1]].arrays)]
    return [math.inf] * len(instruction.arrays)


def _fusion(
    computations: dict[str, Computation], fused: Computation
) -> tuple[list[float], list[float]]:
    """Return upper bounds on the bytes read of each operand and written of each result."""
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
