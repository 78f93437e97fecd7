"""Find the loops of machine code in its control flow graph.

Source: Aho, Lam, Sethi and Ullman, "Compilers: principles, techniques, and tools", 2nd edition,
section 9.6 (dominators, back edges, natural loops).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Loop(NamedTuple):
    """A natural loop."""

    head: int  # position of the instruction that every iteration starts with
    parent: int | None  # index of the enclosing loop in the list of loops
    own: tuple[int, ...]  # positions of its instructions, those of inner loops excepted
    # Those of its own instructions that a forward branch may skip.
    conditional: frozenset[int]


class Code(NamedTuple):
    """The instructions of a kernel that its entry reaches, by the loop they belong to."""

    loops: tuple[Loop, ...]  # ordered by their heads, an enclosing loop before those inside
    straight: tuple[int, ...]  # positions outside of all loops
    conditional: frozenset[int]  # of `straight`, those that a forward branch may skip


def analyse(size: int, jumps: Mapping[int, Sequence[int]]) -> Code:
    """Find the loops of a kernel.

    Args:
      size: Number of its instructions. The first one is its entry.
      jumps: For each instruction that may not continue with the next one: the positions where the
        kernel continues; none if it ends there.

    Raises:
      ValueError: A cycle has several entries.
    """
    starts = _block_starts(size, jumps)
    following = _successors(size, starts, jumps)
    order = _reverse_postorder(following)
    dominators = _dominators(order, following)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    rank = {block: k for k, block in enumerate(order)}
    for block in order:
        for head in following[block]:
            if head in dominators[block]:
                latches.setdefault(head, []).append(block)
            elif rank[head] <= rank[block]:
                raise ValueError("loops: a cycle of the code has several entries")
    for head, ends in latches.items():
        bodies[head] = _body(head, ends, following)
    heads = sorted(bodies, key=lambda head: (starts[head], -len(bodies[head])))
    ends_of_code = [block for block in order if not following[block]]
    innermost = {
        block: min((h for h in heads if block in bodies[h]), key=lambda h: len(bodies[h]))
        for block in order
        if any(block in body for body in bodies.values())
    }

    def positions(blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(p for b in sorted(blocks) for p in range(starts[b], (*starts, size)[b + 1]))

    def skipped(blocks: Iterable[int], ends: Iterable[int]) -> frozenset[int]:
        ends = list(ends)
        return frozenset(
            positions(b for b in blocks if not all(b in dominators[end] for end in ends))
        )

    found = []
    for head in heads:
        around = [h for h in heads if h != head and head in bodies[h]]
        parent = min(around, key=lambda h: len(bodies[h]), default=None)
        own = [block for block in order if innermost.get(block) == head]
        found.append(
            Loop(
                starts[head],
                None if parent is None else heads.index(parent),
                positions(own),
                skipped(own, latches[head]),
            )
        )
    outside = [block for block in order if block not in innermost]
    return Code(tuple(found), positions(outside), skipped(outside, ends_of_code))


def _block_starts(size: int, jumps: Mapping[int, Sequence[int]]) -> list[int]:
    targets = {target for found in jumps.values() for target in found}
    return sorted({0, *targets, *(position + 1 for position in jumps)} & set(range(size)))


def _successors(
    size: int, starts: Sequence[int], jumps: Mapping[int, Sequence[int]]
) -> list[list[int]]:
    index = {start: block for block, start in enumerate(starts)}
    found = []
    for end in (*starts[1:], size):
        targets = jumps.get(end - 1, (end,))
        found.append([index[target] for target in targets if target < size])
    return found


def _reverse_postorder(following: Sequence[Sequence[int]]) -> list[int]:
    order, seen, stack = [], {0}, [(0, iter(following[0]))]
    while stack:
        block, rest = stack[-1]
        fresh = next((b for b in rest if b not in seen), None)
        if fresh is None:
            order.append(stack.pop()[0])
        else:
            seen.add(fresh)
            stack.append((fresh, iter(following[fresh])))
        del block
    return order[::-1]


def _dominators(order: Sequence[int], following: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Return the blocks on every path to a block, which is one of them."""
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in following[block]:
            before[target].append(block)
    found = {block: set(order) for block in order}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = {block}.union(set.intersection(*(found[b] for b in before[block])))
            changed |= new != found[block]
            found[block] = new
    return found


def _body(head: int, latches: Sequence[int], following: Sequence[Sequence[int]]) -> set[int]:
    before: dict[int, list[int]] = {}
    for block, targets in enumerate(following):
        for target in targets:
            before.setdefault(target, []).append(block)
    body, todo = {head}, list(latches)
    while todo:
        block = todo.pop()
        if block not in body:
            body.add(block)
            todo += before.get(block, [])
    return body
