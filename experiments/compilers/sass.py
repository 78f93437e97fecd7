"""Read the machine code of NVIDIA GPUs (SASS) as nvdisasm prints it.

Opcodes are listed in NVIDIA, "CUDA binary utilities",
https://docs.nvidia.com/cuda/cuda-binary-utilities/
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from experiments.compilers.loops import Code, analyse


class Kernel(NamedTuple):
    """The code of a kernel."""

    name: str
    opcodes: tuple[str, ...]  # with modifiers
    code: Code


def parse(text: str) -> list[Kernel]:
    """Parse the kernels in the output of `nvdisasm -c`.

    Subroutines, such as the slow path of a division, are left out: the fast path skips the call.
    """
    parts = re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]
    return [_parse(part) for part in parts]


def _parse(part: str) -> Kernel:
    name = part.split(":", 1)[0].strip()
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str, str]] = []  # guard, opcode, operands
    for line in part.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+ +)?([A-Z][\w.]*)(.*?);", line):
            instructions.append((found[1] or "", found[2], found[3]))
    jumps: dict[int, tuple[int, ...]] = {}
    for position, (guard, opcode, operands) in enumerate(instructions):
        kind = opcode.split(".")[0]
        always = not guard or guard.strip() in ("@PT", "@UPT")
        after = () if always else (position + 1,)
        target = re.search(r"`\(([^)]+)\)", operands)
        # A call of a local label is a jump. .DIV jumps if the threads of a warp have diverged.
        far = kind == "CALL" and target is not None and target[1].startswith(".L_")
        if kind == "BRA" and _waits(instructions[:position], guard or operands):
            continue  # as if neither a barrier nor tensor memory was ever waited for
        if far or (kind == "BRA" and ".DIV" not in opcode):
            condition = operands.split("`")[0].strip(" ,")
            if condition and condition not in ("PT", "UPT"):
                after = (position + 1,)
            if not target or target[1] not in labels:
                raise ValueError(f"sass: {name} jumps to an unknown place: {opcode}{operands}")
            jumps[position] = (*after, labels[target[1]])
        elif kind in ("EXIT", "RET"):
            jumps[position] = after
        elif kind in ("BRX", "JMP", "JMX", "BRXU"):
            raise ValueError(f"sass: {name} jumps to an unknown place: {opcode}{operands}")
    opcodes = tuple(opcode for _, opcode, _ in instructions)
    return Kernel(name, opcodes, analyse(len(opcodes), jumps))


def _waits(before: Sequence[tuple[str, str, str]], condition: str) -> bool:
    """Return whether the condition of a branch is the result of a wait."""
    predicate = re.search(r"\bU?P\d\b", condition)
    for _, opcode, operands in reversed(before):
        if predicate and re.match(rf"\s*{predicate[0]}\b", operands):
            return "TRYWAIT" in opcode or "FIND_AND_SET" in opcode
    return False
