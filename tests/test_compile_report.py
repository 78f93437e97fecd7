"""Tests of `compile_report` without its compilers: its requests, and its rows."""

import json

import pytest

from capsjax.kernels.vote_passes.cases import CASES
from experiments import compile_report
from experiments.compile_report import Config
from experiments.compilers import targets
from experiments.compilers.compiling import CompileRequest
from experiments.errors import InputError

GPU = {
    "temporary_mb": 107.3,
    "moved_mb": 660.9,
    "accessed_mb": None,
    "matrix_gflop": 0.5,
    "vector_gflop": 0.13,
    "kernels": [
        {"name": "a", "registers": 50, "spills": 0, "shared_memory": 8320, "pallas": False},
        {"name": "b", "registers": 40, "spills": 8, "shared_memory": 0, "pallas": False},
    ],
}
OWN = {"name": "mine", "registers": 30, "spills": 0, "shared_memory": 4096, "pallas": True}
TPU = {
    **GPU,
    "accessed_mb": 707.1,
    "kernels": [{"name": "c", "bundles": 530, "vector_memory": 168000, "pallas": True}],
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
    refused = describe({"reason": "needs 99.0 GB of 80 GB"})
    assert compile_report.line(refused).endswith("not compiled: needs 99.0 GB of 80 GB")


def test_rows_have_costs_and_no_time():
    known = {"target", "implementation", "case", "gradients", "sizes", "jax", "date"}
    assert describe(GPU).keys() == known | GPU.keys()
    titles = "target case implementation pass temp MB moved MB XLA's MB GFLOP regs spill B chip kB"
    assert compile_report.heading().split() == [*titles.split(), "bundles"]


def cells(row):
    """Return the cells of a printed row by their titles."""
    head, text = compile_report.heading(), compile_report.line(row)
    start, found = len(head), {}
    for name, width in reversed(compile_report._COLUMNS.items()):
        start -= width
        found[name] = text[start : start + width].strip()
    return found


def test_row_shows_the_largest_figure_of_any_kernel():
    shown = cells(describe(GPU))
    assert (shown["regs"], shown["spill B"], shown["chip kB"]) == ("50", "8", "8")
    assert (shown["bundles"], shown["XLA's MB"], shown["GFLOP"]) == ("", "", "0.63")


def test_row_shows_pallas_kernels_rather_than_those_of_xla():
    shown = cells(describe({**GPU, "kernels": [*GPU["kernels"], OWN]}))
    assert (shown["regs"], shown["spill B"], shown["chip kB"]) == ("30", "0", "4")


def test_row_of_a_tpu_shows_bundles_and_the_count_of_xla():
    shown = cells(describe(TPU))
    assert (shown["regs"], shown["bundles"], shown["chip kB"]) == ("", "530", "168")
    assert shown["XLA's MB"] == "707.1"


def test_every_row_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        compile_report,
        "compile_costs",
        lambda request: TPU if request.gradients else {"reason": "why"},
    )
    output = tmp_path / "rows.jsonl"
    config = Config(target="tpu_v5e", case="long", output=str(output))
    assert compile_report.main(config) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(written) == len(compile_report.requests(config))
    assert written[0]["sizes"] == CASES["long"]._asdict()
    assert written[0]["reason"] == "why"
    assert written[1]["kernels"] == TPU["kernels"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [compile_report.heading(), *map(compile_report.line, written)]
