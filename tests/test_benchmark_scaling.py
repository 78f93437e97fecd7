"""Tests of `benchmark_scaling`: its cases, and the communication of compiled programs."""

import json
import math
import os

import in_process
import pytest

from capsjax.kernels.vote_passes.cases import Case
from experiments import benchmark_scaling
from experiments.benchmarks.scaling import ShardedCase
from experiments.compilers import hlo

SMALL = Case(batch=4, capsules=16, length=2, parents=3, depth=5)
STATE = 4 * SMALL.parents * SMALL.depth  # bytes of a weighted sum of votes, of one example
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


def test_sent_counts_loops_and_the_larger_branch_but_no_group_of_one():
    assert hlo.sent(PROGRAM) == {"all-reduce": 3 * 8 * 4, "all-gather": 8 * 4}


def test_strong_scaling_keeps_the_problem_and_weak_scaling_grows_it():
    named = benchmark_scaling.cases("cpu")
    assert {(case.data, case.capsules) for _, case in named} == {
        *((count, 1) for count in benchmark_scaling.HOST_DEVICES),
        *((1, count) for count in benchmark_scaling.HOST_DEVICES),
    }
    for kind, case in named:
        devices = case.data * case.capsules
        (size,) = {c.case.batch * c.case.capsules for k, c in named if k == kind and _is_single(c)}
        assert case.case.batch * case.case.capsules == size * (devices if "weak" in kind else 1)
        assert (case.work == "training") == ("training" in kind)
    for target, counts in benchmark_scaling.DEVICES.items():
        found = [(kind, case.capsules) for kind, case in benchmark_scaling.cases(target)]
        assert found == [
            (f"{name}, strong", count) for name in benchmark_scaling.LARGE for count in counts
        ]


def _is_single(case):
    return case.data * case.capsules == 1


def test_devices_send_partial_sums_and_gradients_but_no_votes(tmp_path, monkeypatch, capsys):
    trained = benchmark_scaling.TRAINED._replace(batch=8, capsules=36)
    named = [
        ("routing", ShardedCase("routing", "cpu", data=2, capsules=2, case=SMALL)),
        ("training", ShardedCase("training", "cpu", data=1, capsules=2, case=trained)),
    ]
    monkeypatch.setattr(benchmark_scaling, "cases", lambda target: named)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    files = {"output": tmp_path / "rows.jsonl", "figure": tmp_path / "scaling.png"}
    flags = {"target": "cpu", "repeats": 1, **files}
    status, printed, _ = in_process.run(benchmark_scaling, flags, monkeypatch, capsys)
    assert status == 0
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
    routing, training = [json.loads(line) for line in files["output"].read_text().splitlines()]
    table = printed.splitlines()[1:]
    assert [line.split()[:3] for line in table] == [
        ["cpu", "routing", "4"],
        ["cpu", "training", "2"],
    ]
    assert [len(row["seconds"]) for row in (routing, training)] == [0, 1]  # timed with enough cores
    assert routing["memory_mb"] > routing["argument_mb"] > 0
    # Of the examples of a device, three sums of votes forward and two backward; of its capsules,
    # the gradient of the weights.
    sums = 5 * SMALL.batch // 2 * STATE
    weights = 4 * math.prod(SMALL[1:5]) // 2
    assert routing["sent_mb"] == {"all-reduce": pytest.approx((sums + weights) / 1e6)}
    poses = 4 * 8 * 36 * 8  # of the batch, to the devices of their capsules and back
    assert training["sent_mb"]["all-to-all"] == pytest.approx(2 * poses / 2 / 1e6)
    # A third of the arguments is parameters; Adam's moments are not sent.
    assert training["sent_mb"]["all-reduce"] == pytest.approx(training["argument_mb"] / 3, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target": "abacus"}, "--target must name any of cpu, tpu_v5e, h100, got 'abacus'"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_bad_flags_print_one_line(flags, message, monkeypatch, capsys):
    status, printed, stderr = in_process.run(benchmark_scaling, flags, monkeypatch, capsys)
    assert (status, printed) == (2, "")
    assert stderr == f"benchmark_scaling: {message}\n"
