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
