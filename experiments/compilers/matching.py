"""Match the loops of a GPU kernel's machine code with those of its PTX.

Machine code (SASS) has the instructions of each loop, but hides how often the loop runs. PTX shows
that. ptxas keeps the order and the nesting of loops, so the loops of both are matched in order. It
may unroll a loop, partly or entirely, and remove what nothing reads or what is never executed, but
it adds no products, stores or asynchronous copies. So the kind of which most is left tells by how
much a loop is unrolled; where a part of each kind is gone, the arithmetic has to agree. A kernel
where any of this does not hold is an error.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Sequence

from experiments.compilers import ptx, sass
from experiments.compilers.loops import Loop

# Kinds of which ptxas may find that two are the same, or split one. They decide only where there
# are no others.
_INEXACT = {"load", "load shared", "shuffle"}
_ARITHMETIC = "arithmetic"
# By how much arithmetic may differ: two operations may be the same, or one be expanded.
_LEAST, _MOST = 0.75, 1.6
# Kinds of instructions that ptxas keeps one to one, by the first part of an opcode.
_PTX_KINDS = {
    name: kind
    for kind, names in {
        "product": ("mma",),
        "group product": ("wgmma",),
        "tensor memory": ("tcgen05",),
        "load matrix": ("ldmatrix",),
        "store matrix": ("stmatrix",),
        "asynchronous copy": ("cp",),
        "reduction": ("red",),
        "shuffle": ("shfl",),
    }.items()
    for name in names
}
_SASS_KINDS = {
    name: kind
    for kind, names in {
        "product": ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA"),
        "group product": ("HGMMA", "QGMMA", "IGMMA"),
        "tensor memory": ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"),
        "load matrix": ("LDSM",),
        "store matrix": ("STSM",),
        "asynchronous copy": ("LDGSTS",),
        "reduction": ("RED", "REDG"),
        "shuffle": ("SHFL",),
        "store": ("STG",),
        "store shared": ("STS",),
        "load shared": ("LDS",),
        "load": ("LDG",),
        _ARITHMETIC: ("FADD", "FMUL", "FFMA"),
    }.items()
    for name in names
}


def iterations(intermediate: ptx.Kernel, code: sass.Kernel, grid: Sequence[int]) -> list[int]:
    """Return the iterations of each loop of the machine code in one execution of the kernel.

    Every choice of loops that ptxas may have unrolled entirely, without leaving a loop, is tried.

    Args:
      intermediate: The kernel in PTX.
      code: The same kernel in machine code.
      grid: Numbers of blocks that it is launched with.

    Raises:
      ValueError: The trip count of a loop is unknown, or the loops do not match.
    """
    known = ptx.trips(intermediate, grid)
    before, after = intermediate.code.loops, code.code.loops
    found, reasons = [], []
    for unrolled in itertools.combinations(range(len(before)), max(0, len(before) - len(after))):
        kept = [k for k in range(len(before)) if k not in unrolled]
        parents = [
            None if (p := before[k].parent) is None else kept.index(p)
            for k in kept
            if before[k].parent is None or before[k].parent in kept
        ]
        if parents == [loop.parent for loop in after]:
            try:
                found.append(_trips(intermediate, code, known, kept))
            except ValueError as error:
                reasons.append(error)
    if found and all(other == found[0] for other in found):
        return found[0]
    if reasons and not found:
        raise reasons[0]
    raise ValueError(
        f"matching: the loops of {code.name} differ: {_nesting(before)} in PTX, {_nesting(after)} "
        "in machine code"
    )


def _trips(
    intermediate: ptx.Kernel, code: sass.Kernel, known: Sequence[int], kept: Sequence[int]
) -> list[int]:
    """Return the iterations of each loop of the machine code, given which loops are left.

    Args:
      intermediate: The kernel in PTX.
      code: The kernel in machine code.
      known: Iterations of the loops in PTX.
      kept: Indices of the loops in PTX that are loops in machine code, too.

    Raises:
      ValueError: The numbers of instructions exclude it.
    """
    loops = intermediate.code.loops
    kinds = [_ptx_kind(instruction.opcode) for instruction in intermediate.instructions]
    machine_kinds = [_SASS_KINDS.get(opcode.split(".")[0]) for opcode in code.opcodes]

    def iterations_each(index: int) -> int:
        """Return the iterations of a loop each time that it is entered."""
        parent = loops[index].parent
        entered = 1 if parent is None else known[parent]
        if known[index] % max(1, entered):
            raise ValueError(f"matching: the iterations of an unrolled loop of {code.name} vary")
        return known[index] // max(1, entered)

    def instructions(parent: int | None, own: Iterable[int]) -> collections.Counter[str]:
        """Count the instructions of a loop in PTX, those of unrolled loops inside included."""
        total = _tally(kinds, own)
        for index, loop in enumerate(loops):
            if loop.parent == parent and index not in kept:
                for kind, number in instructions(index, loop.own).items():
                    total[kind] += number * iterations_each(index)
        return total

    found = []
    for index, new in zip(kept, code.code.loops, strict=True):
        written, left = instructions(index, loops[index].own), _tally(machine_kinds, new.own)
        inner = any(loops[k].parent == index for k in kept)
        factor = _unrolled(written, left, known[index], inner)
        if factor is None or (factor > 1 and iterations_each(index) % factor):
            raise ValueError(
                f"matching: a loop of {code.name} has {dict(written)} in PTX and {dict(left)} in "
                f"machine code, for {known[index]} iterations"
            )
        found.append(known[index] // factor)
    if any(loop.parent is None and index not in kept for index, loop in enumerate(loops)):
        written = instructions(None, intermediate.code.straight)
        left = _tally(machine_kinds, code.code.straight)
        if _unrolled(written, left, 1, False) != 1:
            raise ValueError(
                f"matching: the code of {code.name} has {dict(written)} in PTX and {dict(left)} in "
                "machine code"
            )
    return found


def _unrolled(
    written: collections.Counter[str], left: collections.Counter[str], times: int, inner: bool
) -> int | None:
    """Return how many iterations of a loop in PTX one of machine code does; None if unknown.

    Args:
      written: Its instructions in PTX by kind.
      left: Those in machine code.
      times: Its iterations in PTX.
      inner: Whether loops are inside. They would be repeated, so it cannot be unrolled.
    """
    ratios = {kind: left[kind] / number for kind, number in written.items()}
    arithmetic = ratios.pop(_ARITHMETIC, None)
    deciding = ratios.keys() - _INEXACT or ratios.keys()
    factor = max((ratios[kind] for kind in deciding), default=0.0)
    if inner or times <= 1:
        return 1 if factor <= 1 else None
    number = math.ceil(factor)
    if number < 1 or number == factor:
        return number or None
    agrees = arithmetic is not None and _LEAST * number <= arithmetic <= _MOST * number
    return number if agrees else None


def _tally(kinds: Sequence[str | None], positions: Iterable[int]) -> collections.Counter[str]:
    return collections.Counter(kind for p in positions if (kind := kinds[p]))


def _ptx_kind(opcode: str) -> str | None:
    kind, *modifiers = opcode.split(".")
    if kind in ("ld", "st"):
        name = {"ld": "load", "st": "store"}[kind]
        if "shared" in modifiers or "shared::cta" in modifiers:
            return f"{name} shared"
        return name if "global" in modifiers else None
    if kind in ("add", "sub", "mul", "fma") and modifiers[-1] == "f32":
        return _ARITHMETIC
    if kind == "wgmma" and "mma_async" not in modifiers:
        return None
    if kind == "tcgen05" and modifiers[0] != "mma":
        return None
    if kind == "cp" and modifiers[:1] == ["async"] and not {"global"} & set(modifiers):
        return None  # commits or waits
    return _PTX_KINDS.get(kind)


def _nesting(loops: Sequence[Loop]) -> str:
    """Write the nesting of loops in parentheses."""

    def inside(parent: int | None) -> str:
        return "".join(f"({inside(k)})" for k, x in enumerate(loops) if x.parent == parent)

    return inside(None) or "none"
