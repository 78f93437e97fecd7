"""What devices send, from program texts and from programs over host devices."""

import json
import math

import in_process
import pytest

from capsjax.kernels.vote_passes.cases import Case
from experiments import benchmark_scaling
from experiments.compilers import hlo

SMALL = Case(batch=4, capsules=16, length=2, parents=3, depth=5)
STATE = 4 * SMALL.parents * SMALL.depth  # bytes of the sums of one example
PROGRAM = """\
HloModule program

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %array = f32[8]{0} get-tuple-element(%state), index=1
  %summed = f32[8]{0} all-reduce(%array), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[8]{0}) tuple(%count, %summed)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %go_on = pred[] constant(true)
}

%silent (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

%loud (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %all = f32[32]{0} all-gather-start(%b), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %part = f32[8]{0} slice(%all), slice={[0:8]}
}

ENTRY %main (i: s32[], p: s32[], x.1: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %p = s32[] parameter(1)
  %x.1 = f32[8]{0} parameter(2)
  %alone = f32[8]{0} all-reduce(%x.1), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %alone.1 = f32[8]{0} all-reduce(%alone), replica_groups=[4,1]<=[4], to_apply=%add
  %start = (s32[], f32[8]{0}) tuple(%i, %alone.1)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %end = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %r = f32[8]{0} conditional(%p, %end, %end), branch_computations={%silent, %loud}
}
"""


def test_what_is_sent_counts_loops_and_branches_and_no_device_alone():
    assert hlo.sent(PROGRAM) == {"all-reduce": 3 * 8 * 4, "all-gather": 8 * 4}


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """What a run with small problems on two devices writes, by the kind."""
    monkeypatch.setattr(benchmark_scaling, "HOST_CASE", SMALL)
    monkeypatch.setattr(benchmark_scaling, "HOST_DEVICES", (2,))
    trained = benchmark_scaling.TRAINED._replace(batch=8, capsules=36)
    monkeypatch.setattr(benchmark_scaling, "TRAINED", trained)
    every = benchmark_scaling.programs
    unlike = {"training, strong", "training, weak"}  # a compilation each, and nothing new
    monkeypatch.setattr(
        benchmark_scaling,
        "programs",
        lambda target: [(kind, program) for kind, program in every(target) if kind not in unlike],
    )
    files = {"output": tmp_path / "rows.jsonl", "figure": tmp_path / "scaling.png"}
    flags = {"target": "cpu", "repeats": 1, **files}
    status, printed, _ = in_process.run(benchmark_scaling, flags, monkeypatch, capsys)
    assert status == 0
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
    found = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert len(found) == len(printed.splitlines()) - 1
    return {row["kind"]: row for row in found}


def test_devices_send_sums_of_votes_or_gradients_and_no_votes(rows):
    for kind in ("capsules, strong", "capsules, weak", "examples, strong", "examples, weak"):
        row, sizes = rows[kind], rows[kind]["sizes"]
        weights = 4 * math.prod(sizes[k] for k in ("capsules", "length", "parents", "depth"))
        # Three sums of votes forward, two backward; or the gradient that examples share.
        wanted = 5 * sizes["batch"] * STATE if "capsules" in kind else weights
        assert row["sent_mb"] == {"all-reduce": pytest.approx(wanted / 1e6)}
        assert row["memory_mb"] > row["argument_mb"] > 0
    training = rows["split training"]
    poses = 4 * 8 * 36 * 8  # of the batch, to the devices of their capsules and back
    assert training["sent_mb"]["all-to-all"] == pytest.approx(2 * poses / 2 / 1e6)
    # Of the parameters and Adam's two moments, the gradients are summed.
    assert training["sent_mb"]["all-reduce"] == pytest.approx(training["argument_mb"] / 3, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target": "abacus"}, "--target must name any of cpu, tpu_v5e, h100, got 'abacus'"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_used_is_one_line(flags, message, monkeypatch, capsys):
    status, printed, complaint = in_process.run(benchmark_scaling, flags, monkeypatch, capsys)
    assert (status, printed) == (2, "")
    assert complaint == f"benchmark_scaling: {message}\n"
