"""Tests of `compilers.hlo`: traffic of recorded XLA programs against counts by hand."""

import pathlib

import pytest

from experiments.compilers import hlo

# jax.lax.scan(lambda c, row: (tanh(c + row @ y), 2 * tanh(c + row @ y)), zeros, x) with x
# [5, 64, 64] and y [64, 64], by jax 0.10.2, without metadata.
RECORDED = pathlib.Path(__file__).parent / "recorded"
STEPS, MATRIX = 5, 64 * 64 * 4


def recorded(target):
    return (RECORDED / f"scan.{target}.hlo").read_text()


def test_gpu_traffic_is_operands_results_and_slices_times_the_trip_count():
    before = (4 + 4) + MATRIX + STEPS * MATRIX  # the counter's copy, two arrays of zeros
    row = 4 + MATRIX + MATRIX  # the step's number, a row of x, its copy
    product = 3 * MATRIX + MATRIX
    update = 4 + MATRIX + MATRIX  # in place: one row of the result
    count = 4 + 4
    expected = before + STEPS * (row + product + update + count)
    assert hlo.traffic(recorded("h100")) == hlo.Traffic(expected, ())


def test_asynchronous_fusion_has_the_same_traffic():
    row = "%loop_dynamic_slice_fusion = f32[1,64,64]{2,1,0}"
    started = (  # as jax 0.12 writes it
        "%fusion-start = ((f32[5,64,64]{2,1,0}, s32[]), f32[1,64,64]{2,1,0}, u32[]) fusion-start"
    )
    lines = []
    for line in recorded("h100").splitlines():
        if row in line:
            lines += [line.replace(f"{row} fusion", started), f"  {row} fusion-done(%fusion-start)"]
        else:
            lines.append(line)
    assert any("fusion-start(" in line for line in lines)
    assert hlo.traffic("\n".join(lines)) == hlo.traffic(recorded("h100"))


def test_arrays_in_vector_memory_have_no_traffic():
    padded = 64 * 128 * 4  # tiles of 8 x 128 pad 64 columns to 128
    before = (4 + 4) + padded + STEPS * padded  # a copy; y and x are read, their casts stay
    step = 4 + (4 + 4) + 4 + padded  # a copy to scalar memory, a sum, a test; a row of the result
    after = padded  # the last carry is written
    assert hlo.traffic(recorded("tpu_v5e")) == hlo.Traffic(before + STEPS * step + after, ())


def test_traffic_grows_if_all_arrays_are_in_memory():
    everywhere = recorded("tpu_v5e").replace("S(1)", "")
    assert hlo.traffic(everywhere).moved > 2 * hlo.traffic(recorded("tpu_v5e")).moved


def test_trip_count_is_found_among_the_operands_of_the_loop():
    text = recorded("tpu_v5e")
    moved = text.replace(
        "%constant.30 = s32[]{:T(128)} constant(5)",
        "%constant.30 = s32[]{:T(128)} get-tuple-element(%wide.arg_tuple.0), index=6",
    )
    moved = moved.replace(
        "%constant.13 = s32[]{:T(128)} constant(0)", "%constant.13 = s32[] constant(5)"
    )
    assert hlo.traffic(moved) == hlo.traffic(text)


def test_unknown_trip_count_is_an_error():
    text = recorded("tpu_v5e").replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match=r"^hlo: how often does while\.1 run\?"):
        hlo.traffic(text)


KERNEL = """
ENTRY %main.1 (x.1: f32[100,200]) -> f32[100,200] {
  %x.1 = f32[100,200]{1,0:T(8,128)} parameter(0)
  %exp.1 = f32[100,200]{1,0:T(8,128)S(1)} exponential(%x.1)
  %mine.1 = f32[100,200]{1,0:T(8,128)} custom-call(%exp.1), custom_call_target="tpu_custom_call"
  ROOT %copy.1 = f32[100,200]{0,1:T(8,128)} copy(%mine.1)
}
"""


def test_kernel_calls_are_listed_with_the_memory_of_their_operands():
    traffic = hlo.traffic(KERNEL)
    size = 104 * 256 * 4
    transposed = 200 * 128 * 4
    (call,) = traffic.kernels
    assert call.operands == (hlo.Array("f32", (100, 200), size, in_memory=False),)
    assert call.results == (hlo.Array("f32", (100, 200), size, in_memory=True),)
    assert call.calls == 1
    assert traffic.moved == size + (size + transposed)


@pytest.mark.parametrize(
    ("shape", "itemsize", "size"),
    [((8, 128), 4, 4096), ((9, 1), 4, 8192), ((3, 9, 129), 2, 3 * 16 * 256 * 2), ((130,), 4, 1024)],
)
def test_tiled_size_pads_to_whole_tiles(shape, itemsize, size):
    assert hlo.tiled_size(shape, itemsize) == size


def test_each_instruction_is_listed_with_its_executions():
    found = {e.name: e for e in hlo.executed(recorded("h100"))}
    assert sum(e.calls * e.moved for e in found.values()) == hlo.traffic(recorded("h100")).moved
    assert {e.calls for e in found.values()} == {0, 1, STEPS}
    # XLA never tests the condition of a loop whose trip count it knows.
    tests = [e for e in hlo.executed(recorded("tpu_v5e")) if e.calls == STEPS + 1]
    assert "lt.2" in {e.name for e in tests}
    assert all(e.moved == 0 for e in tests)


HANDED = """
%sum.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%fused.1 (q.1: f32[4,100]) -> f32[100] {
  %q.1 = f32[4,100]{1,0} parameter(0)
  %zero.1 = f32[] constant(0)
  ROOT %reduce.1 = f32[100]{0} reduce(%q.1, %zero.1), dimensions={0}, to_apply=%sum.1
}

ENTRY %main.1 (x.1: f32[100]) -> f32[100] {
  %x.1 = f32[100]{0} parameter(0)
  %mine.1 = (f32[4,100]{1,0}, f32[7]{0}) custom-call(%x.1), custom_call_target="__gpu$xla.gpu.triton"
  %part.1 = f32[4,100]{1,0} get-tuple-element(%mine.1), index=0
  %rest.1 = f32[7]{0} get-tuple-element(%mine.1), index=1
  %total.1 = f32[100]{0} fusion(%part.1), kind=kInput, calls=%fused.1
  ROOT %out.1 = (f32[100]{0}, f32[7]{0}) tuple(%total.1, %rest.1)
}
"""  # noqa: E501


def test_partial_sums_are_what_a_reduction_reads():
    (call,) = hlo.traffic(HANDED).kernels
    assert call.handed == 4 * 100 * 4
    (call,) = hlo.traffic(HANDED.replace("reduce(%q.1, %zero.1)", "slice(%q.1)")).kernels
    assert call.handed == 0


PRODUCT = """
ENTRY %main.1 (a.1: bf16[5,3,4], b.1: bf16[5,4,6]) -> bf16[5,3,6] {
  %a.1 = bf16[5,3,4]{2,1,0} parameter(0)
  %b.1 = bf16[5,4,6]{2,1,0} parameter(1)
  %gemm.1 = (bf16[5,3,6]{2,1,0}, s8[4194304]{0}) custom-call(%a.1, %b.1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %c.1 = bf16[5,3,6]{2,1,0} get-tuple-element(%gemm.1), index=0
}
"""  # noqa: E501


def test_products_of_a_library_have_their_operations():
    found = {e.name: (e.product, e.dtype) for e in hlo.executed(PRODUCT)}
    assert found["gemm.1"] == (2 * 5 * 3 * 4 * 6, "bf16")
    assert found["a.1"] == (0, "")
