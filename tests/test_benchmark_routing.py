"""The benchmark of routing: rows are measured, and what cannot be is a row with its reason."""

import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import test_figures

import capsjax
from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes, xla
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.config import CONFIGS, XlaConfig
from capsjax.kernels.vote_passes.passes import Device, Inputs, Spec, State
from capsjax.routing import _arguments
from experiments.benchmark_routing import Config, main
from experiments.benchmarks import roofline, routing_rows, timing
from experiments.benchmarks.routing_rows import Way
from experiments.compilers import arithmetic
from experiments.errors import InputError
from experiments.figures import routing_speed

ROOT = pathlib.Path(__file__).parents[1]
TINY = Case(batch=3, capsules=6, length=4, parents=3, depth=5, num_iterations=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A case that takes no time, and peaks of arrays that take none."""
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setattr(roofline, "TRIAD_SIZE", 1024)
    monkeypatch.setattr(roofline, "PRODUCT_SIDES", (16,))
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)


@pytest.fixture
def backend(monkeypatch):
    """Adds an implementation: the passes of "xla" under another name, but for its config."""

    def add(name, config_for):
        module = types.SimpleNamespace(**{**vars(xla), "config_for": config_for})
        monkeypatch.setitem(sys.modules, f"{passes.__package__}.{name}", module)
        for user in (passes, _arguments):
            monkeypatch.setattr(user, "IMPLEMENTATIONS", (*user.IMPLEMENTATIONS, name))

    return add


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_measured_printed_written_and_drawn(tmp_path, capsys):
    output = tmp_path / "new" / "rows.jsonl"
    config = Config(
        cases="tiny", implementations="xla,reference", scaling="2,6", repeats=2,
        output=str(output), figures=str(tmp_path / "figures"),
    )  # fmt: skip
    assert main(config) == 0
    rows = lines_of(output)
    assert [(row["implementation"], row["mode"], row["capsules"]) for row in rows] == [
        (name, mode, capsules)
        for capsules in (6, 2)  # 6 is the case's own
        for mode in ("forward", "gradients")
        for name in ("reference", "xla")
    ]
    for row in rows:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["compile_seconds"] > 0
        assert row["calls"] >= 1
        assert (row["rounds"], row["baseline"], row["peak_bytes"]) == (2, "reference", None)
        assert row["difference"] < 1e-5
        roof = max(
            row["least_bytes"] / row["peak_bytes_per_second"],
            row["least_flops"] / row["peak_flops_per_second"],
        )
        assert row["roofline_percent"] == pytest.approx(100 * roof / row["median"])
        assert {"device", "jax", "date"} <= row.keys()
    stored, fused = rows[2:4]
    assert fused["speedup"] == stored["median"] / fused["median"]
    assert stored["temporary_bytes"] > 0
    printed = capsys.readouterr().out
    assert "tiny B=3 I=6 P=4 J=3 D=5 T=2\n" in printed
    assert "tiny B=3 I=2 P=4 J=3 D=5 T=2\n" in printed
    assert f"{1e3 * fused['median']:.3f}" in printed
    for name in ("time_over_capsules", "roofline"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000


def test_the_difference_shows_a_wrong_implementation(monkeypatch):
    right = capsjax.dynamic_routing

    def wrong(*arrays, implementation, **settings):
        if implementation.name == "wrong":
            return 1.5 * right(*arrays, implementation="reference", **settings)
        return right(*arrays, implementation=implementation, **settings)

    monkeypatch.setattr(capsjax, "dynamic_routing", wrong)
    ways = [Way(name, "gradients", "float32") for name in ("reference", "wrong")]
    _, row = routing_rows.measure("tiny", TINY, ways, repeats=1)
    assert row["difference"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unsupported("too many parents"), "too many parents"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 GB\nmore"), "RESOURCE_.*no 9 GB"),
        (MemoryError("no 9 GB"), "no 9 GB"),
    ],
)
def test_what_does_not_run_here_is_a_row_with_its_reason(
    monkeypatch, backend, tmp_path, capsys, error, reason
):
    def refuse(*arguments, **settings):
        raise error

    backend("refusing", refuse)
    backend("elsewhere", refuse)
    monkeypatch.setitem(passes.PLATFORMS, "elsewhere", "mars")
    output = tmp_path / "rows.jsonl"
    main(Config(
        cases="tiny", implementations="xla,refusing,elsewhere", modes="forward", repeats=1,
        output=str(output), figures=str(tmp_path),
    ))  # fmt: skip
    xla, refusing, elsewhere = lines_of(output)
    assert xla["median"] > 0
    assert "median" not in refusing
    assert re.search(f"^{reason}$", refusing["reason"])
    assert elsewhere["reason"].startswith("runs on mars only")
    assert (
        f"refusing, forward, float32: not measured: {refusing['reason']}" in capsys.readouterr().out
    )


def test_kernels_of_another_platform_are_rows_with_their_reason(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    names = ("triton", "mosaic_tpu")
    main(Config(
        cases="tiny", implementations=",".join(names), modes="forward", repeats=1,
        output=str(output),
    ))  # fmt: skip
    printed = capsys.readouterr().out
    for row, name, platform in zip(lines_of(output), names, ("cuda", "tpu"), strict=True):
        assert row["implementation"] == name
        assert row["reason"] == f"runs on {platform} only, and this is a cpu"
        assert f"{name}, forward, float32: not measured: {row['reason']}\n" in printed


def test_any_other_error_is_not_hidden(backend):
    def fail(*arguments, **settings):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    backend("failing", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main(Config(cases="tiny", implementations="failing", repeats=1))


def test_a_figure_without_rows_is_not_drawn(backend, tmp_path, capsys):
    def refuse_six(spec, inputs, others, *, device):
        if inputs.poses.shape[1] == 6:
            raise Unsupported("six")
        return xla.config_for(spec, inputs, others, device=device)

    backend("refusing", refuse_six)
    settings = {"cases": "tiny", "implementations": "refusing", "modes": "forward", "repeats": 1}
    assert main(Config(**settings, scaling="2", figures=str(tmp_path))) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["time_over_capsules.png"]
    assert "roofline.png is not drawn: none of its rows" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_not_started():
    huge = Case(batch=32, capsules=10**9, length=8, parents=10, depth=16)
    (row,) = routing_rows.measure("huge", huge, [Way("xla", "forward", "float32")], repeats=1)
    assert row["reason"].startswith("its inputs need 12288.0 GB, and ")


def test_a_sweep_tries_neighbours_and_prints_the_best(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CONFIGS, "xla", lambda case: XlaConfig(4, 1))
    output = tmp_path / "rows.jsonl"
    main(Config(
        cases="tiny", implementations="xla", modes="forward", sweep=True, repeats=1,
        output=str(output),
    ))  # fmt: skip
    rows = lines_of(output)
    assert [tuple(row["config"].values()) for row in rows] == [(4, 1), (2, 1), (8, 1), (4, 2)]
    assert all(row["difference"] < 1e-5 for row in rows)
    first = min(rows, key=lambda row: row["median"])["config"]
    printed = capsys.readouterr().out
    title = f"xla children={first['children']} examples={first['examples']}"
    assert f"best, forward, float32: {title}, " in printed


def test_the_tile_that_is_given_is_the_one_used():
    def loops(config):
        """The lengths of the loops in the program that is timed."""
        function = routing_rows.function_of(Way("xla", "forward", "float32", config), 2)
        equations = arithmetic.equations(function, *routing_rows.inputs_of(TINY))
        return {e.params["length"] for e, _ in equations if e.primitive.name == "scan"}

    assert 3 in loops(XlaConfig(children=2, examples=3))
    assert 3 not in loops(XlaConfig(children=6, examples=3))


def test_every_implementation_with_a_config_can_be_swept():
    case = TINY._replace(num_iterations=1)  # of one pass
    inputs = Inputs(
        jax.ShapeDtypeStruct((case.batch, case.capsules, 1, case.length), case.dtype),
        jax.ShapeDtypeStruct(case[1:5], case.dtype),
    )
    device = Device(jax.devices()[0].device_kind)
    for name in passes.IMPLEMENTATIONS:
        module = importlib.import_module(f"{passes.__package__}.{name}")
        assert hasattr(module, "config_for") == (name in CONFIGS), name
        if name in CONFIGS:
            own = module.config_for(Spec(case.parents), inputs, State(), device=device)
            assert routing_rows.variants(name, case)[0] == own


def test_least_work_is_the_count_by_hand():
    # B=2 I=3 P=4 J=5 D=6: poses 24, weights 360, outputs 60; M = 1440, E = 360.
    case = Case(batch=2, capsules=3, length=4, parents=5, depth=6, num_iterations=3)
    forward = roofline.least_work(case, gradients=False)
    assert forward == (4 * (3 * 384 + 60), 3 * 1440 + 4 * 360)
    both = roofline.least_work(case, gradients=True)
    # 6 passes, outputs and cotangents, and both gradients written once.
    assert both.bytes == 4 * (6 * 384 + 2 * 60 + 384)
    # Backward: 2 (M + 3E) for the logits' gradients, M + 2·4E + 2M in the last pass.
    assert both.flops == forward.flops + 2 * (1440 + 1080) + 1440 + 2880 + 2880
    half = roofline.least_work(case._replace(dtype="bfloat16"), gradients=True)
    assert (2 * half.bytes, half.flops) == both
    once = roofline.least_work(case._replace(num_iterations=1), gradients=True)
    assert once == (4 * (2 * 384 + 2 * 60 + 384), 3 * 1440)


def test_a_roofline_is_the_slower_of_both_sides():
    peak = roofline.Peak(bytes=10.0, flops=100.0)
    assert roofline.Work(bytes=20, flops=100).seconds(peak) == 2
    assert roofline.Work(bytes=20, flops=1000).seconds(peak) == 10


def test_a_round_is_long_and_every_program_has_its_turn(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "ROUND_SECONDS", 10.0)

    def program(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return timing.Program(run, wait=lambda result: None)

    times = timing.time_programs({"a": program("a", 4.0), "b": program("b", 20.0)}, repeats=3)
    assert times == {"a": (4, 4, 4, 3), "b": (20, 20, 20, 1)}
    assert "".join(calls).endswith("aaabaaabaaab")


torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


@torch
def test_torch_computes_the_same_and_is_measured(tmp_path):
    routing_rows.check_torch(CASES["capsnet_mnist"])
    output = tmp_path / "rows.jsonl"
    main(Config(
        cases="tiny", implementations="reference", torch=True, repeats=1, output=str(output)
    ))  # fmt: skip
    rows = [row for row in lines_of(output) if row["implementation"] == "torch"]
    assert [row["mode"] for row in rows] == ["forward", "gradients"]
    assert all(row["difference"] < 1e-5 and row["median"] > 0 for row in rows)


@torch
def test_a_torch_form_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(
        routing_rows.torch_routing,
        "arrays",
        lambda result: jax.tree.map(lambda x: x.numpy() * np.float32(1.001), result),
    )
    with pytest.raises(RuntimeError, match=r"^PyTorch's forward differs by 1\.0e-03"):
        routing_rows.check_torch(TINY)


def test_torch_asked_for_and_absent_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--torch needs PyTorch: pip install torch$"):
        main(Config(cases="tiny", torch=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cases": "tiny,mnits"}, r"^--cases must be among .*tiny, got 'mnits'$"),
        ({"implementations": "gpu"}, "^--implementations must be among reference, xla.*'gpu'$"),
        ({"implementations": "reference", "sweep": True}, "^--implementations must be among xla"),
        ({"modes": "backward"}, "^--modes must be among forward, gradients, got 'backward'$"),
        ({"dtypes": "float8"}, "^--dtypes must be among float32, bfloat16, got 'float8'$"),
        ({"scaling": "1,two"}, "^--scaling must be whole numbers from 1 up, .* got 'two'$"),
        ({"scaling": "0"}, "^--scaling must be whole numbers from 1 up, .* got '0'$"),
        ({"output": "/dev/null/rows"}, "^/dev/null/rows cannot be written: File exists$"),
    ],
)
def test_bad_input_is_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        main(Config(**{"cases": "tiny", **settings}))


def test_the_program_ends_with_one_line_and_status_2():
    command = [sys.executable, "-m", "experiments.benchmark_routing", "--repeats=0"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    message = "benchmark_routing: --repeats must be at least 1, got 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


# Figures


def rows(*names, cases=("tiny",), capsules=(8, 64, 100_000), dtypes=("float32",), reason=""):
    """Rows as `measure` gives them; the first name has none with times past 1,000 capsules."""
    return [
        {
            **TINY._asdict(), "case": case, "capsules": I, "implementation": name, "mode": mode,
            "dtype": dtype, "config": None, "device": "a device with a long name",
            **({"reason": reason} if reason and I > 1000 and name == names[0] else {
                "min": 1e-6 * I, "median": (1 + n) * 2e-6 * I, "max": 9e-6 * I,
                "least_bytes": 100, "least_flops": 700 * (1 + len(case) + len(mode)),
                "flops_per_second": 1e9 / (1 + n), "peak_bytes_per_second": 2e10,
                "peak_flops_per_second": 1e11 if dtype == "float32" else 4e11,
            }),
        }
        for case in cases
        for I in capsules  # noqa: E741
        for n, name in enumerate(names)
        for mode in ("forward", "gradients")
        for dtype in dtypes
    ]  # fmt: skip


ALL = ("reference", "xla", "mosaic_tpu", "triton", "torch")
FIGURES = {
    "time": lambda: routing_speed.time_over_capsules(rows(*ALL, reason="too large")),
    "time, one point": lambda: routing_speed.time_over_capsules(rows("xla", capsules=(5,))),
    "time, dtypes": lambda: routing_speed.time_over_capsules(
        rows(*ALL, dtypes=("float32", "bfloat16"))
    ),
    "roofline": lambda: routing_speed.roofline(
        rows(*ALL, cases=[*CASES], capsules=(8,), dtypes=("float32", "bfloat16"))
    ),
    "roofline, one": lambda: routing_speed.roofline(rows("xla", capsules=(5,))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_can_be_read(name):
    test_figures.assert_legible(FIGURES[name]())


def test_lines_are_the_medians_and_crosses_what_was_not_measured():
    figure = routing_speed.time_over_capsules(rows("reference", "xla", reason="too large"))
    for axes in figure.axes:
        stored, cross, fused = axes.get_lines()
        np.testing.assert_allclose(stored.get_xydata(), [(8, 0.016), (64, 0.128)])
        np.testing.assert_allclose(cross.get_xdata(), [100_000])
        np.testing.assert_allclose(fused.get_ydata(), [0.032, 0.256, 400])


def test_the_roof_bends_where_both_sides_meet():
    (axes,) = routing_speed.roofline(rows("xla", capsules=(8,))).axes
    roof = axes.get_lines()[0].get_xydata()
    np.testing.assert_allclose(roof[:, 1], np.minimum(100, 20 * roof[:, 0]))
    assert roof[0, 1] < 100 == roof[-1, 1]
    points = [line.get_xydata()[0] for line in axes.get_lines()[1:]]
    np.testing.assert_allclose(points, [(7 * 12, 1), (7 * 14, 1)])


@pytest.mark.parametrize("draw", [routing_speed.time_over_capsules, routing_speed.roofline])
def test_no_row_is_an_error(draw):
    with pytest.raises(ValueError, match="rows must hold one with a time, got none"):
        draw([])
