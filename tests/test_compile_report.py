"""Tests of `compile_report` without its compilers: its requests, and its rows."""

import dataclasses
import json
import re

import jax
import pytest

from capsjax.kernels.vote_passes.cases import CASES, FAMILY
from experiments import compile_report
from experiments.compile_report import Config
from experiments.compilers import compiling, targets
from experiments.compilers.compiling import CompileRequest
from experiments.errors import InputError

GPU = {
    "temporary_mb": 107.3,
    "moved_mb": 660.9,
    "accessed_mb": None,
    "matrix_gflop": 0.5,
    "vector_gflop": 0.13,
    "launches": 41,
    "partial_mb": 10.81,
    "issue_us": 74.0,
    "memory_us": 437.2,
    "floor_us": 437.7,
    "bounds_us": {"issue": 1.2, "memory": 436.5},
    "kernels": [
        {"name": "a", "registers": 50, "spills": 0, "shared_memory": 8320, "pallas": False},
    ],
}
OWN = {
    "name": "mine",
    "pallas": True,
    "calls": 2,
    "registers": 30,
    "spills": 8,
    "loop_local": 3,
    "shared_memory": 4096,
    "loop_barriers": 12,
    "resident_blocks": 5,
    "waves": 1,
    "instructions": 24235,
    "issue_us": 24.48,
    "product_us": 2.4,
    "memory_us": 4.0,
    "requested_mb": 55.96,
}
TPU = {
    **GPU,
    "accessed_mb": 707.1,
    "kernels": [
        {
            "name": "c",
            "pallas": True,
            "calls": 2,
            "bundles": 530,
            "executed": 52230,
            "vector_memory": 168000,
            "issue_us": None,
            "memory_us": 0.0,
        }
    ],
}


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(targets, "check_installed", lambda name: None)


def test_all_implementations_and_cases_are_requested_with_and_without_gradients():
    asked = compile_report.requests(Config(target="h100,tpu_v5e"))
    assert len(set(asked)) == len(asked)
    for target in ("h100", "tpu_v5e"):
        for name, case in CASES.items():
            for implementation in ("reference", "xla"):
                for gradients in (False, True):
                    request = CompileRequest(target, implementation, case, gradients)
                    assert (name, request) in asked


@pytest.mark.parametrize(
    ("target", "kernels"), [("h100", "triton"), ("a100", "triton"), ("tpu_v5e", "mosaic_tpu")]
)
def test_targets_have_the_kernels_of_their_platform(target, kernels):
    assert compile_report.implementations(target) == ["reference", "xla", kernels]


@pytest.mark.parametrize("name", FAMILY)
def test_cases_of_other_routings_are_requested_and_have_gradients_of_all_arrays(name):
    function, case = FAMILY[name]
    config = Config(target="h100", case=name, implementation="triton")
    asked = [request for _, request in compile_report.requests(config)]
    assert [(p.function, p.case, p.gradients) for p in asked] == [
        (function, case, False),
        (function, case, True),
    ]
    tiny = case._replace(batch=2, capsules=3)
    forward, both = (
        compiling.routing(dataclasses.replace(p, case=tiny, implementation="xla")) for p in asked
    )
    outputs, gradients = jax.eval_shape(both[0], *both[1])
    assert outputs == jax.eval_shape(forward[0], *forward[1])
    assert gradients == forward[1]


def test_flags_narrow_the_requests():
    config = Config(target="a100", case="long,capsnet_mnist", implementation="xla")
    asked = [(name, p.implementation, p.gradients) for name, p in compile_report.requests(config)]
    assert asked == [(n, "xla", g) for n in ("long", "capsnet_mnist") for g in (False, True)]


def test_scaling_requests_1k_to_1m_capsules_without_stored_votes():
    asked = compile_report.requests(Config(target="a100", scaling=True))
    sizes = {request.case.capsules for _, request in asked}
    assert (min(sizes), max(sizes)) == (2**10, 2**20)
    assert len({request.case._replace(capsules=0) for _, request in asked}) == 1
    assert all(p.gradients and p.implementation != "reference" for _, p in asked)


@pytest.mark.parametrize(
    ("flag", "text", "unknown"), [("case", "mnist", "mnist"), ("implementation", "xla,", "")]
)
def test_unknown_name_is_an_input_error(flag, text, unknown):
    with pytest.raises(InputError, match=rf"^--{flag} must name any of .*, got '{unknown}'$"):
        compile_report.requests(Config(**{flag: text}))


def describe(costs):
    """Return the row of a request with the given costs."""
    request = CompileRequest("h100", "xla", CASES["capsnet_mnist"], True)
    return compile_report.describe("capsnet_mnist", request, costs)


def test_request_that_does_not_compile_has_its_reason():
    refused = describe({"reason": "not compiled: needs 99.0 GB of 80 GB"})
    assert compile_report.line(refused).endswith(" not compiled: needs 99.0 GB of 80 GB")
    assert compile_report.kernel_lines(refused) == []


def test_rows_have_settings_and_costs():
    known = {"target", "implementation", "case", "gradients", "sizes", "jax", "date"}
    options = {"prior", "bias", "mask", "gradient", "precision", "function"}
    assert describe(GPU).keys() == known | options | GPU.keys()


def table(titles, lines, start):
    """Return the cells of the rows of a printed table by their titles."""
    names = re.findall(r"(?<=\s)\S+(?: \S+)*", titles[start:])
    ends = [start + match.end() for match in re.finditer(r"\S+(?: \S+)*", titles[start:])]
    return [
        {n: line[a:b].strip() for n, a, b in zip(names, [start, *ends], ends, strict=False)}
        for line in lines
    ]


def test_row_shows_floors_and_launches():
    (shown,) = table(compile_report.heading(), [compile_report.line(describe(GPU))], 62)
    assert shown == {
        "temp MB": "107.30",
        "moved MB": "660.9",
        "partial MB": "10.8",
        "GFLOP": "0.63",
        "launches": "41",
        "issue us": "74.0",
        "memory us": "437.2",
        "floor us": "437.7",
        "bound": "memory",
        "gain": "",
    }


def test_pallas_kernels_of_a_gpu_have_rows_of_their_own():
    assert compile_report.kernel_lines(describe(GPU)) == []
    titles, *rows = compile_report.kernel_lines(
        describe({**GPU, "kernels": [*GPU["kernels"], OWN]})
    )
    (shown,) = table(titles, rows, 39)
    assert rows[0].split()[0] == "mine"
    assert (shown["calls"], shown["regs"], shown["spill B"], shown["in loops"]) == (
        *("2", "30", "8", "3"),
    )
    assert (shown["smem kB"], shown["barriers"], shown["instructions"]) == ("4", "12", "24235")
    assert (shown["issue us"], shown["asked MB"]) == ("24.5", "56.0")


def test_pallas_kernels_of_a_tpu_have_their_executed_bundles():
    titles, row = compile_report.kernel_lines(describe(TPU))
    (shown,) = table(titles, [row], 39)
    assert (shown["bundles"], shown["executed"], shown["vmem kB"]) == ("530", "52230", "168")
    assert shown["issue us"] == ""  # the clock is unknown


def test_gain_is_the_floor_of_stored_votes_over_that_of_the_row(monkeypatch, capsys, tmp_path):
    floors = {"reference": 437.7, "xla": None, "triton": 247.0}
    monkeypatch.setattr(
        compile_report,
        "compile_costs",
        lambda request: {**GPU, "floor_us": floors[request.implementation]},
    )
    output = tmp_path / "rows.jsonl"
    compile_report.main(Config(target="h100", case="long", output=str(output)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    gains = {(r["implementation"], r["gradients"]): r.get("gain") for r in rows}
    assert gains["triton", True] == pytest.approx(437.7 / 247.0)
    assert gains["reference", False] == 1
    assert gains["xla", True] is None
    assert " 1.77" in capsys.readouterr().out


def test_every_row_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        compile_report,
        "compile_costs",
        lambda request: TPU if request.gradients else {"reason": "not compiled: why"},
    )
    output = tmp_path / "rows.jsonl"
    config = Config(target="tpu_v5e", case="long", output=str(output))
    assert compile_report.main(config) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(written) == len(compile_report.requests(config))
    assert written[0]["sizes"] == CASES["long"]._asdict()
    assert written[0]["reason"] == "not compiled: why"
    assert written[1]["kernels"] == TPU["kernels"]
    printed = capsys.readouterr().out.splitlines()
    expected = [compile_report.heading()]
    for row in written:
        expected += [compile_report.line(row), *compile_report.kernel_lines(row)]
    assert printed == expected


def test_settings_of_programs_reach_every_request(monkeypatch):
    monkeypatch.setattr(targets, "check_installed", lambda target: None)
    config = compile_report.Config(case="capsnet_mnist", dtype="bfloat16", precision="highest")
    named = compile_report.requests(config)
    assert {(x.case.dtype, x.precision) for _, x in named} == {("bfloat16", "highest")}
