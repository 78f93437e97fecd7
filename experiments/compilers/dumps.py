"""Reads what compilers leave behind about each kernel: registers and spills, memory, bundles."""

import dataclasses
import importlib.metadata
import pathlib
import re
import subprocess
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A kernel of a GPU program, XLA's own ones included."""

    name: str
    registers: int  # a thread
    spills: int  # bytes a thread, stored and loaded
    shared_memory: int  # bytes a block


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """A kernel or fused operation of a TPU program."""

    name: str
    bundles: int  # instruction words of its code, each a cycle when it does not wait
    vector_memory: int  # bytes of its windows and scratch


def gpu_kernels(folder: pathlib.Path, capability: tuple[int, int]) -> list[GpuKernel]:
    """Assembles the PTX that `--xla_dump_to` left in a folder.

    Raises:
      RuntimeError: ptxas refuses it.
    """
    shared: dict[str, int] = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        shared |= parse_shared_memory(path.read_text())
    kernels: list[GpuKernel] = []
    # An empty one holds the module's constants.
    for path in (path for path in sorted(folder.glob("*.ptx")) if path.stat().st_size > 1):
        target = re.search(r"^\.target (\w+)", path.read_text(), re.MULTILINE)
        architecture = target[1] if target else "sm_{}{}".format(*capability)
        command = [str(_ptxas()), "-v", f"-arch={architecture}", str(path), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {path.name}: {done.stderr.strip()}")
        kernels += parse_ptxas(done.stderr, shared)
    return kernels


def parse_ptxas(report: str, dynamic: dict[str, int]) -> Iterator[GpuKernel]:
    """Reads what `ptxas -v` prints; `dynamic` is the shared memory that is asked for at launch."""
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        static = re.search(r"(\d+) bytes smem", part)
        yield GpuKernel(
            name=name,
            registers=int(re.search(r"Used (\d+) registers", part)[1]),  # type: ignore[index]
            spills=sum(map(int, spills)),
            shared_memory=dynamic.get(name, 0) + (int(static[1]) if static else 0),
        )


def parse_shared_memory(thunks: str) -> dict[str, int]:
    """Bytes of shared memory at launch by kernel, from XLA's list of what it runs."""
    found = re.findall(r"\] (\S+) grid: .*shared_memory: (\d+) bytes", thunks)
    return {name: int(size) for name, size in found}


def tpu_kernels(folder: pathlib.Path) -> list[TpuKernel]:
    """Reads what `--xla_jf_dump_to` left in a folder."""
    kernels = []
    for path in sorted(folder.glob("*-schedule-analysis_final_bundles.txt")):
        found = re.match(r"(\d+-(.+))-\d+-schedule", path.name)
        if not found or found[2][0] == "<" or found[2] == "TLP":  # the program around them
            continue
        if analysis := path.read_text():  # empty for what only names memory
            code = next(folder.glob(f"{found[1]}-*-original.txt")).read_text()
            kernels.append(TpuKernel(found[2], parse_bundles(analysis), parse_vector_memory(code)))
    return kernels


def parse_bundles(analysis: str) -> int:
    """Instruction words in a schedule."""
    return int(re.search(r"total scheduled bundles:\s*(\d+)", analysis)[1])  # type: ignore[index]


def parse_vector_memory(code: str) -> int:
    """Bytes of vector memory that a kernel allocates."""
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", code))


def _ptxas() -> pathlib.Path:
    for file in importlib.metadata.files("nvidia-cuda-nvcc") or []:
        if file.name == "ptxas":
            return pathlib.Path(str(file.locate()))
    raise RuntimeError("nvidia-cuda-nvcc holds no ptxas")
