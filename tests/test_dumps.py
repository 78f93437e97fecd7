"""Tests of `experiments.compilers` on excerpts of real dumps, against counts by hand."""

import pathlib
import re

import pytest

from experiments.compilers import bundles, dumps, duplicates, floors, issue, loops, ptx, sass
from experiments.compilers.data_sheets import TARGETS

RECORDED = pathlib.Path(__file__).parent / "recorded"

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
003: kWhile        [prev=002 (1) | next=007 (1)]   
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    005: kDynamicSliceFusion [source       | next=007 (1)] params=1, results=1
        006: kCopy [source | sink] kCopy
    007: kCustomKernel       [prev=002 (1) | next=004 (1)] my_kernel grid: [32, 2, 1] threads: [128, 1, 1]  shared_memory: 16384 bytes
"""  # noqa: E501, W291
METADATA = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "slice.1"
    thunk_id: 1
  }
  thunk_kind: "kCustomKernel"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "compare.1"
    thunk_id: 4
  }
}
thunk_metadata {
  thunk_info {
    profile_annotation: "update.1"
    thunk_id: 5
  }
}
thunk_metadata {
  thunk_info {
    profile_annotation: "pallas_call.2"
    thunk_id: 7
  }
}
"""


def test_ptxas_report_has_registers_spills_and_static_shared_memory():
    assert list(dumps.parse_ptxas(PTXAS)) == [
        dumps.Usage("my_kernel", registers=110, spills=0, shared_memory=0),
        dumps.Usage("crowded", registers=32, spills=2232 + 3024, shared_memory=1024),
    ]


def test_launches_have_their_instructions_and_a_fused_slice_is_one_launch():
    assert dumps.parse_launches(THUNKS, METADATA) == [
        dumps.Launch("kCustomKernel", "slice.1", "wrapped_slice", (32, 1, 1), 0),
        dumps.Launch("kCustomKernel", "compare.1", "loop_compare_fusion", (1, 1, 1), 0),
        dumps.Launch("kDynamicSliceFusion", "update.1", "", (), 0),
        dumps.Launch("kCustomKernel", "pallas_call.2", "my_kernel", (32, 2, 1), 16384),
    ]


# A loop of two iterations around one of three.
PTX = """\
.version 9.0
.target sm_90a
.visible .entry sums(
	.param .u64 .ptr sums_param_0
)
.reqntid 64, 1, 1
{
	.reg .pred %p<4>;
	ld.param.b64 %rd1, [sums_param_0];
	mov.u32 %r1, %ctaid.x;
	mov.pred %p1, -1;
$L__BB0_1:
	mov.b32 %r2, -12;
$L__BB0_2:
	ld.global.nc.b32 %r3, [%rd1]; // the value
	bar.sync 0;
	add.s32 %r2, %r2, 12;
	setp.lt.u32 %p2, %r2, 24;
	@%p2 bra $L__BB0_2;
	mov.pred %p3, %p1;
	mov.pred %p1, 0;
	@%p3 bra $L__BB0_1;
	st.global.v2.b32 [%rd1], {%r3, %r3};
	ret;
}
"""
INNER = """\
        /*0030*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""
SASS = """\
.text.sums:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MOV R2, RZ ;
.L_x_0:
{inner}        /*0050*/                   ISETP.NE.AND P0, PT, R2, 0x24, PT ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.64 desc[UR4][R4.64], R2 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""


SASS_OF_PTX = SASS.format(inner=INNER)


def count(text=PTX, code=SASS_OF_PTX, grid=(5,)):
    (intermediate,), (machine,) = ptx.parse(text), sass.parse(code)
    return issue.count(intermediate, machine, grid)


def test_instructions_of_a_loop_count_with_its_iterations():
    found = count()
    # LDC, STG and EXIT; twice MOV and BRA; six times LDG, BAR, ISETP and BRA.
    assert found.instructions == 3 + 2 * 2 + 6 * 4
    assert (found.requested, found.barriers) == (32 * (6 * 4 + 8), 6)
    assert [(x.depth, x.trips, x.instructions, x.barriers) for x in found.loops] == [
        (0, 2, 2, 0),
        (1, 6, 4, 1),
    ]
    # 2 warps a block, 5 blocks on 4 processors: the busiest one executes 2 blocks.
    assert issue.cycles(found, threads=64, grid=(5,), processors=4) == 31 * 2 * 2 // 4


def test_an_unrolled_loop_has_fewer_iterations():
    found = count(code=SASS.format(inner=3 * INNER))
    assert [(x.trips, x.instructions) for x in found.loops] == [(2, 2), (2, 8)]
    assert found.instructions == 3 + 2 * 2 + 2 * 8


@pytest.mark.parametrize("code", [SASS.format(inner=2 * INNER), SASS.format(inner="")])
def test_loops_that_do_not_match_are_an_error(code):
    # Twice the barriers do not divide three iterations; no barrier tells nothing.
    with pytest.raises(ValueError, match=r"^matching: a loop of sums has {'.*} in PTX and {.*}"):
        count(code=code)


@pytest.mark.parametrize(
    ("loads", "sums", "trips"),
    [
        (4, 6, 3),  # as in PTX
        (8, 12, None),  # unrolled by two, three iterations would leave one
        (3, 6, 3),  # a load is merged
        (12, 18, 1),  # unrolled by three
        (11, 18, 1),
        (3, 18, None),  # the arithmetic disagrees
        (0, 6, None),
    ],
)
def test_loads_and_arithmetic_decide_where_nothing_is_exact(loads, sums, trips):
    text = PTX.replace("	bar.sync 0;\n", "").replace(
        "	ld.global.nc.b32 %r3, [%rd1]; // the value\n",
        4 * "	ld.global.nc.b32 %r3, [%rd1];\n" + 6 * "	add.rn.f32 %r4, %r4, %r3;\n",
    )
    load, add = (f"        /*0030*/  {x} ;\n" for x in ("LDG.E R3, [R4.64]", "FADD R4, R4, R3"))
    code = SASS.format(inner=loads * load + sums * add)
    if trips is None:
        with pytest.raises(ValueError, match=r"^matching: a loop of sums has"):
            count(text, code)
    else:
        assert count(text, code).loops[1].trips == 2 * trips


def test_a_loop_that_is_missing_or_new_is_an_error():
    code = SASS_OF_PTX
    with pytest.raises(ValueError, match=r"^matching: a loop of sums has {'load': 3} in PTX"):
        count(code=code.replace("@P1 BRA `(.L_x_1)", "NOP"))
    with pytest.raises(ValueError, match=r"differ: \(\(\)\) in PTX, \(\(\)\)\(\) in machine code$"):
        count(
            code=code.replace("@P1 BRA `(.L_x_1) ;", "@P1 BRA `(.L_x_1) ;\n.L_x_3:").replace(
                "        /*0090*/                   EXIT",
                "        /*0088*/  @P2 BRA `(.L_x_3) ;\n        /*0090*/                   EXIT",
            )
        )


def test_a_loop_that_is_unrolled_entirely_counts_with_its_parent():
    lines = SASS.format(inner=3 * INNER).replace("@P0 BRA `(.L_x_0)", "NOP")
    found = count(code=lines)
    assert [(x.trips, x.instructions, x.barriers) for x in found.loops] == [(2, 10, 3)]
    assert found.instructions == 3 + 2 * 10


def test_iterations_are_those_of_the_busiest_block():
    bound = PTX.replace("setp.lt.u32 %p2, %r2, 24", "setp.lt.s32 %p2, %r2, %r1")
    (kernel,) = ptx.parse(bound)
    # From -12 by 12 until at least the number of the last block, 40.
    assert ptx.trips(kernel, (41, 1, 1)) == [2, 2 * 5]


def test_iterations_that_depend_on_the_contents_of_arrays_are_an_error():
    (kernel,) = ptx.parse(PTX.replace("setp.lt.u32 %p2, %r2, 24", "setp.lt.u32 %p2, %r3, 24"))
    with pytest.raises(ValueError, match=r"^ptx: a trip count in sums depends on array contents$"):
        ptx.trips(kernel, (5,))


def test_waits_for_barriers_in_memory_count_once():
    wait = """\
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%rd1], 0;
	@!complete bra.uni waitLoop;
	}
"""
    (kernel,) = ptx.parse(PTX.replace("	st.global", 2 * wait + "	st.global"))
    assert ptx.trips(kernel, (5,)) == [2, 6]
    retry = """\
.L_x_5:
        /*0071*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR40], R7 ;
        /*0072*/              @!P0 BRA `(.L_x_5) ;
        /*0080*/"""
    (machine,) = sass.parse(SASS_OF_PTX.replace("        /*0080*/", retry))
    assert len(machine.code.loops) == 2


def test_what_a_forward_branch_skips_is_conditional():
    # 0 -> 1 or 3; 3 -> 3 or 4; the unreachable end is not counted.
    code = loops.analyse(7, {0: (1, 3), 3: (4, 3), 5: ()})
    assert code.straight == (0, 1, 2, 4, 5)
    assert code.conditional == {1, 2}
    assert code.loops == (loops.Loop(3, None, (3,), frozenset()),)


def test_a_cycle_with_two_entries_is_an_error():
    with pytest.raises(ValueError, match="several entries"):
        loops.analyse(4, {0: (1, 2), 1: (2,), 2: (1, 3)})


def test_calls_of_subroutines_are_left_out():
    call = """\
        /*0080*/              @!P2 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0080*/"""
    code = SASS_OF_PTX.replace("        /*0080*/", call)
    assert count(code=code).instructions == 31 + 1
    # Some code calls local labels instead of jumping there.
    far = SASS_OF_PTX.replace("BRA `(.L_x_1)", "CALL.REL.NOINC `(.L_x_1)")
    assert count(code=far).instructions == 31


@pytest.mark.parametrize(
    ("registers", "memory", "threads", "blocks"),
    [
        (64, 0, 128, 8),  # 32 warps of 2,048 registers fit, 8 blocks
        (65, 0, 128, 7),  # registers are handed out by the 256
        (168, 0, 256, 1),  # 12 warps fit, 1 block of 8
        (32, 74 * 1024, 128, 3),  # 75 KiB a block of 228 with the system's
        (32, 0, 32, 32),  # the most blocks
    ],
)
def test_resident_blocks(registers, memory, threads, blocks):
    processor = TARGETS["h100"].gpu.multiprocessor
    assert issue.resident_blocks(registers, memory, threads, processor) == blocks


@pytest.mark.parametrize(
    ("opcode", "operations"),
    [
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HGMMA.64x32x8.F32.TF32", 2 * 16 * 32 * 8),
    ],
)
def test_operations_of_products(opcode, operations):
    assert floors.product_operations(opcode) == operations


def test_a_product_of_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match=r"^floors: the shape of the product UTCHMMA is unknown$"):
        floors.product_operations("UTCHMMA")


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
# A loop of five iterations, whose region of three bundles is skipped in all but the first.
FINAL = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s90_s3 = smov 0 /* copy {for} cssa */  ;;  %12 = sst [smem:[#allocation9_spill]] %s91_s7 }
   0x1 LB: > { %s5_s4 = sadd.s32 1, %s2_s3  ;;  %s2_s3 = sphi %s90_s3, %s95_s3 /* phi
copy */  ;;  %p9_p0 = scmp.ne.s32.totalorder %s2_s3, 0 } /* Start region 7 */
   0x2   : > { %33 = sbr.rel (%p9_p0) target = $region5  ;;  %v1_v0 = vld [vmem:[%s9_s1] sm:$0xff] }
   0x3   : > { %v2_v1 = vadd.f32 %v1_v0, %v1_v0 }
   0x4   : > { %41 = vst [vmem:[%s9_s1] sm:$0xff] /*vst_source=*/%v2_v1 } /* End region 4 */
   0x5 PF: > { %p7_p2 = scmp.ge.s32.totalorder %s5_s4, 5 } /* Start/End empty region 5 */
   0x6   : > { %s95_s3 = smov %s5_s4  ;;  %12 = sbr.rel (!%p7_p2) target = $region7 }
   0x7   :  {}
   0x8   :  {} /* exit */
"""  # noqa: E501


def test_bundles_count_with_iterations_and_not_if_they_are_skipped():
    found = bundles.execute(bundles.parse(FINAL, delay=1))
    # Of an iteration: 0x1 to 0x3, which follows the branch; 0x4 once; 0x5 to 0x7.
    assert found == bundles.Executed(1 + 5 * 6 + 1 + 1, ((5, 5 * 6 + 1),))


def test_later_targets_execute_more_bundles_after_a_branch():
    early, late = (bundles.execute(bundles.parse(FINAL, delay=d)).total for d in (0, 1))
    assert late - early == 4 + 4  # 0x3 where 0x4 is skipped, 0x7 where the loop goes on


@pytest.mark.parametrize("guard", ["", " (%p7_p2)"])
def test_spilled_scalars_are_known_after_loads_with_and_without_a_predicate(guard):
    spilled = FINAL.replace(
        "%s95_s3 = smov %s5_s4",
        f"%20 = sst [smem:[#allocation8_spill]] %s5_s4 }}\n   0x6   : > {{ "
        f"%s95_s3 = sld [smem:[#allocation8_spill]]{guard.replace('%', '!%')}",
    )
    assert bundles.execute(bundles.parse(spilled, delay=1)).loops == ((5, 5 * 7 + 1),)


def test_an_unknown_number_of_iterations_is_an_error():
    unknown = FINAL.replace("%s90_s3 = smov 0", "%s90_s3 = sld [smem:[#allocation1]]")
    with pytest.raises(ValueError, match=r"^bundles: the iterations of a loop depend"):
        bundles.execute(bundles.parse(unknown, delay=1))


def test_recorded_kernel_executes_the_bundles_of_each_grid_step():
    """A kernel with a grid of 3 steps, each with a loop of 5 iterations."""
    code = bundles.parse((RECORDED / "loop.tpu_v5e.bundles").read_text(), delay=4)
    found = bundles.execute(code)
    grid, inner = found.loops
    # The pipeline takes an iteration before the steps and one after.
    assert (grid[0], inner[0]) == (3 + 2, 3 * 5)
    assert inner[1] == 3 * 5 * len(code.code.loops[1].own)
    assert found.total == len(code.code.straight) + grid[1] + inner[1]


def test_recorded_gpu_kernel_has_loops_of_the_source():
    """The same kernel by Triton, whose loop ptxas unrolls entirely."""
    (intermediate,) = ptx.parse((RECORDED / "loop.h100.ptx").read_text())
    (machine,) = sass.parse((RECORDED / "loop.h100.sass").read_text())
    found = issue.count(intermediate, machine, (3,))
    assert (found.loops, found.barriers) == ((), 5)
    assert found.instructions == len(machine.code.straight)
    # 128 threads have a block of 5 x 8 x 128 numbers, which they load and store once.
    assert found.requested * 128 // 32 == 2 * 5 * 8 * 128 * 4


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
        path.with_name(f"{path.name}-02-final_bundles.txt").write_text(FINAL)
    found = {kernel.name: kernel for kernel in dumps.tpu_kernels(tmp_path, delay=1)}
    assert found.keys() == {"my_kernel.1", "custom-call.2"}
    assert found["custom-call.2"].bundles == 0
    mine = found["my_kernel.1"]
    assert (mine.bundles, mine.vector_memory, mine.executed) == (530, 0x9000 + 0x20000, 33)


def test_calls_of_the_top_level_program_name_their_instructions():
    code = """\
   0xa   :  { %1017 = inlined_call /* <late-initialization> */ }
  0xb5   :  { %192 = inlined_call %s28_s0, %s2_s2 /* %mine.5 = custom-call(%bitcast.1, %bitcast.2) */ }
"""  # noqa: E501
    assert dumps.parse_calls(code) == ["mine.5"]


PROGRAM = """\
%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x.1, %y.1), metadata={op_name="a/{b}/c" stack_frame_id=3}
}

%add.2 (x.2: f32[], y.2: f32[]) -> f32[] {
  %x.2 = f32[] parameter(0)
  %y.2 = f32[] parameter(1)
  ROOT %sum.2 = f32[] add(%x.2, %y.2)
}

ENTRY %main.1 (p.1: f32[8,128]) -> f32[8] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero.1 = f32[] constant(0)
  %copy.1 = f32[8,128]{1,0:T(8,128)S(1)} copy(%p.1)
  %a.1 = f32[8]{0} reduce(%p.1, %zero.1), dimensions={1}, to_apply=%add.1
  %a.2 = f32[8]{0} reduce(%p.1, %zero.1), dimensions={1}, to_apply=%add.2
  %a.3 = f32[8]{0} reduce(%copy.1, %zero.1), dimensions={1}, to_apply=%add.2
  ROOT %a.4 = f32[8]{0} reduce(%p.1, %zero.1), dimensions={0}, to_apply=%add.2
}
"""


def test_equal_instructions_share_code():
    code = duplicates.code_by_instruction(PROGRAM)
    assert code["a.1"] == code["a.2"]
    assert len({code["a.2"], code["a.3"], code["a.4"]}) == 3  # memory spaces, attributes
    assert (
        code["a.2"]
        != duplicates.code_by_instruction(re.sub("add\\(%x.2, %y.2", "add(%x.2, %x.2", PROGRAM))[
            "a.2"
        ]
    )
