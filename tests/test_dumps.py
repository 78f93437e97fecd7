"""Tests of `compilers.dumps` on excerpts of real dumps."""

from experiments.compilers import dumps

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'my_kernel' for 'sm_90a'
ptxas info    : Function properties for my_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 110 registers, used 1 barriers
ptxas info    : Compile time = 256.969 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'crowded' for 'sm_90a'
ptxas info    : Function properties for crowded
    1744 bytes stack frame, 2232 bytes spill stores, 3024 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1744 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 2410.224 ms
"""  # noqa: E501
THUNKS = """\
001: kCustomKernel [source       | next=003 (2)] wrapped_slice grid: [32, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
003: kCustomKernel [prev=002 (1) | next=004 (1)] my_kernel grid: [32, 1, 1] threads: [128, 1, 1]  shared_memory: 16384 bytes
"""  # noqa: E501
ANALYSIS = """\
Schedule analysis:
\ttotal scheduled bundles:    530
\tempty scheduled bundles:    11
\tnon empty scheduled bundles: 519
\t 519.00 scheduled bundles (100.00%): %my_kernel.1 = f32[1024,1024]{1,0:T(8,128)S(1)} custom-call(…)
"""  # noqa: E501
CODE = """\
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'smem constant']
  #allocation1 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'internal scratch']
    #allocation2 [shape = 'u8[131072]{0}', space=vmem, size = 0x20000, scoped, tag = 'input window']
"""  # noqa: E501


def test_ptxas_report_has_registers_spills_static_and_dynamic_shared_memory():
    shared = dumps.parse_shared_memory(THUNKS)
    assert shared == {"wrapped_slice": 0, "my_kernel": 16384}
    assert list(dumps.parse_ptxas(PTXAS, shared)) == [
        dumps.GpuKernel("my_kernel", registers=110, spills=0, shared_memory=16384),
        dumps.GpuKernel("crowded", registers=32, spills=2232 + 3024, shared_memory=1024),
    ]


def test_tpu_dumps_have_bundles_and_vector_memory_of_each_kernel(tmp_path):
    for name, analysis in {
        "my_kernel.1": ANALYSIS,
        "custom-call.2": "",  # an operation without code
        "TLP": ANALYSIS,
        "<late-finalization>": ANALYSIS,
    }.items():
        path = tmp_path / f"1795578598229263834-{name}"
        path.with_name(f"{path.name}-00-original.txt").write_text(CODE)
        path.with_name(f"{path.name}-01-schedule-analysis_final_bundles.txt").write_text(analysis)
    assert dumps.tpu_kernels(tmp_path) == [
        dumps.TpuKernel("my_kernel.1", bundles=530, vector_memory=0x9000 + 0x20000)
    ]
