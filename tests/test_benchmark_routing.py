"""Tests of `benchmark_routing`: measured rows, rows with a reason, roofline, timing, figures."""

import dataclasses
import importlib
import json
import sys
import types
from functools import partial

import jax
import numpy as np
import pytest
import test_figures
import test_tuned

import capsjax
from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes, tuned, xla
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.config import CONFIGS, XlaConfig
from capsjax.kernels.vote_passes.passes import Device, Inputs, Spec, State
from capsjax.routing import _arguments
from experiments import benchmark_routing
from experiments.benchmark_routing import Config, main, select_problems
from experiments.benchmarks import roofline, routing_rows, timing
from experiments.benchmarks.routing_rows import Variant
from experiments.compilers import arithmetic
from experiments.errors import InputError
from experiments.figures import routing_speed

TINY = Case(batch=3, capsules=6, length=4, parents=3, depth=5, num_iterations=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Add a small case, and shrink the probes of the device and the rounds."""
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setattr(roofline, "TRIAD_SIZE", 1024)
    monkeypatch.setattr(roofline, "PRODUCT_SIDES", (16,))
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)


@pytest.fixture
def backend(monkeypatch):
    """Add an implementation: the passes of "xla" with another name and choice of config."""

    def add(name, config_for):
        module = types.SimpleNamespace(**{**vars(xla), "config_for": config_for})
        monkeypatch.setitem(sys.modules, f"{passes.__package__}.{name}", module)
        for user in (passes, _arguments):
            monkeypatch.setattr(user, "IMPLEMENTATIONS", (*user.IMPLEMENTATIONS, name))

    return add


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_measured_printed_written_and_drawn(tmp_path, capsys):
    output = tmp_path / "new" / "rows.jsonl"
    config = Config(
        cases="tiny", implementations="xla,reference", repeats=2,
        output=str(output), figures=str(tmp_path / "figures"),
    )  # fmt: skip
    assert main(config) == 0
    rows = read_rows(output)
    assert [(row["mode"], row["implementation"]) for row in rows] == [
        (mode, name) for mode in ("forward", "gradients") for name in ("reference", "xla")
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
    assert f"{1e3 * fused['median']:.3f}" in printed
    for name in ("time_over_capsules", "roofline"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000


def test_scaling_repeats_the_first_case_with_other_numbers_of_capsules():
    problems = select_problems(Config(cases="tiny,long", scaling="2,6"))
    assert list(problems) == [
        ("long", CASES["long"].capsules),
        ("tiny", 6),
        ("long", 2),
        ("long", 6),
    ]
    assert problems["tiny", 6] == TINY
    assert problems["long", 2] == CASES["long"]._replace(capsules=2)
    assert list(select_problems(Config(cases="tiny", scaling="2,6"))) == [("tiny", 6), ("tiny", 2)]


def test_wrong_implementation_has_a_large_difference(monkeypatch):
    right = capsjax.dynamic_routing

    def wrong(*arrays, implementation, **settings):
        if implementation.name == "wrong":
            return 1.5 * right(*arrays, implementation="reference", **settings)
        return right(*arrays, implementation=implementation, **settings)

    monkeypatch.setattr(capsjax, "dynamic_routing", wrong)
    variants = [Variant(name, "gradients", "float32") for name in ("reference", "wrong")]
    _, row = routing_rows.measure_case("tiny", TINY, variants, repeats=1)
    assert row["difference"] == pytest.approx(0.5, abs=1e-5)


REASONS = {
    "unsupported": (Unsupported("too many parents"), "too many parents"),
    "exhausted": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 GB\nmore"),
        "RESOURCE_EXHAUSTED: no 9 GB",
    ),
    "memory": (MemoryError("no 9 GB"), "no 9 GB"),
}


def test_variants_that_do_not_run_here_are_rows_with_their_reason(backend, tmp_path, capsys):
    def refuse(error, *arguments, **settings):
        raise error

    for name, (error, _) in REASONS.items():
        backend(name, partial(refuse, error))
    names = ["xla", *REASONS, "triton", "mosaic_tpu"]
    output = tmp_path / "rows.jsonl"
    main(Config(
        cases="tiny", implementations=",".join(names), modes="forward", repeats=1,
        output=str(output), figures=str(tmp_path),
    ))  # fmt: skip
    rows = {row["implementation"]: row for row in read_rows(output)}
    assert rows.pop("xla")["median"] > 0
    assert {name: row["reason"] for name, row in rows.items()} == {
        **{name: reason for name, (_, reason) in REASONS.items()},
        "triton": "runs on cuda only, and this is a cpu",
        "mosaic_tpu": "runs on tpu only, and this is a cpu",
    }
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert "median" not in row
        assert f"{name}, forward, float32: not measured: {row['reason']}\n" in printed


def test_other_errors_are_raised(backend):
    def fail(*arguments, **settings):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    backend("failing", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main(Config(cases="tiny", implementations="failing", repeats=1))


def test_figure_without_times_is_not_drawn(backend, tmp_path, capsys):
    def refuse_six(spec, inputs, others, *, device):
        if inputs.poses.shape[1] == 6:
            raise Unsupported("six")
        return xla.config_for(spec, inputs, others, device=device)

    backend("refusing", refuse_six)
    settings = {"cases": "tiny", "implementations": "refusing", "modes": "forward", "repeats": 1}
    assert main(Config(**settings, scaling="2", figures=str(tmp_path))) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["time_over_capsules.png"]
    assert "roofline.png is not drawn: none of its rows" in capsys.readouterr().out


def test_case_too_large_for_memory_is_not_run():
    huge = Case(batch=32, capsules=10**9, length=8, parents=10, depth=16)
    (row,) = routing_rows.measure_case(
        "huge", huge, [Variant("xla", "forward", "float32")], repeats=1
    )
    assert row["reason"].startswith("its inputs need 12288.0 GB, and ")


def test_sweep_measures_neighbouring_configs_prints_the_best_and_writes_it(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(CONFIGS, "xla", lambda case: XlaConfig(4, 1))
    output = tmp_path / "rows.jsonl"
    main(Config(
        cases="tiny", implementations="xla", modes="gradients", sweep=True, repeats=1,
        output=str(output), tuned=str(tmp_path / "new"),
    ))  # fmt: skip
    rows = read_rows(output)
    assert [tuple(row["config"].values()) for row in rows] == [(4, 1), (2, 1), (8, 1), (4, 2)]
    assert all(row["difference"] < 1e-5 for row in rows)
    fastest = min(rows, key=lambda row: row["median"])
    first = fastest["config"]
    printed = capsys.readouterr().out
    title = f"xla children={first['children']} examples={first['examples']}"
    assert f"best, gradients, float32: {title}, " in printed
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "new")
    (row,) = tuned.read(tuned.FOLDER / tuned.file_name(fastest["device"]), fastest["device"])
    assert (row.seconds, row.jax) == (fastest["median"], jax.__version__)
    assert tuned.find("xla", TINY, fastest["device"], XlaConfig) == XlaConfig(**first)


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Return a function that sweeps the tiny case into `tmp_path`, with rows that nothing measured.

    Its argument maps the children of a config to median and difference.
    """
    monkeypatch.setitem(CONFIGS, "xla", lambda case: XlaConfig(4, 1))

    def sweep(results, **settings):
        def measure(name, case, variants, *, repeats):
            rows = []
            for variant in variants:
                fields = {"case": name, **routing_rows._fields(variant, case)}
                median, difference = results[variant.config.children]
                rows.append(fields | {"median": median, "difference": difference})
            return [row | timing.environment() for row in rows]

        monkeypatch.setattr(benchmark_routing, "measure_case", measure)
        monkeypatch.setattr(benchmark_routing, "report", lambda *arguments, **settings: [])
        main(
            Config(cases="tiny", implementations="xla", sweep=True, tuned=str(tmp_path), **settings)
        )
        kind = jax.devices()[0].device_kind
        rows = tuned.read(tmp_path / tuned.file_name(kind), kind)
        return {row.sizes.dtype: (row.config["children"], row.seconds) for row in rows}

    return sweep


def test_sweep_replaces_the_rows_of_its_cases_and_keeps_the_others(sweep):
    first = sweep({4: (2.0, 0), 2: (1.0, 0), 8: (3.0, 0)}, dtypes="float32,bfloat16")
    assert first == {"float32": (2, 1.0), "bfloat16": (2, 1.0)}
    second = sweep({4: (2.0, 0), 2: (1.5, 0), 8: (0.5, 0)}, modes="gradients")
    assert second == {"float32": (8, 0.5), "bfloat16": (2, 1.0)}


def test_sweep_takes_no_config_with_wrong_results(sweep):
    results = {4: (4.0, 0), 2: (3.0, 1e-3), 8: (1.0, 1e-2)}
    assert sweep(results) == {"float32": (2, 3.0)}
    assert sweep(results, dtypes="bfloat16")["bfloat16"] == (8, 1.0)
    assert sweep({4: (1.0, 1.0), 2: (1.0, 1.0), 8: (1.0, 1.0)}) == {
        "float32": (2, 3.0),
        "bfloat16": (8, 1.0),
    }


def test_sweep_into_a_file_that_is_not_valid_is_an_input_error(sweep, tmp_path):
    path = tmp_path / tuned.file_name(jax.devices()[0].device_kind)
    path.write_text("[]")
    with pytest.raises(InputError, match=f"^{path} must have the fields device, rows, got"):
        sweep({})


def test_config_that_does_not_compile_is_a_row_with_its_reason(monkeypatch):
    real = routing_rows.compile_variant

    def refuse(variant, *arguments):
        if variant.config != XlaConfig(4, 1):
            raise jax.errors.JaxRuntimeError("INTERNAL: out of registers\nmore")
        return real(variant, *arguments)

    monkeypatch.setattr(routing_rows, "compile_variant", refuse)
    default, other = (Variant("xla", "forward", "float32", XlaConfig(n, 1)) for n in (4, 8))
    rows = routing_rows.measure_case("tiny", TINY, [default, other], repeats=1)
    assert rows[0]["median"] > 0
    assert rows[1]["reason"] == "JaxRuntimeError: INTERNAL: out of registers"
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of registers"):  # the default config
        routing_rows.measure_case("tiny", TINY, [other, default], repeats=1)


def test_neighbours_change_one_size_or_switch(monkeypatch):
    monkeypatch.setitem(CONFIGS, "xla", lambda case: test_tuned.NESTED)
    tile, _, other = dataclasses.astuple(test_tuned.NESTED)
    assert benchmark_routing.neighbouring_configs("xla", TINY) == [
        test_tuned.NESTED,
        *(
            test_tuned.Nested(test_tuned.Tile(*changed), None, other)
            for changed in ((4, True), (16, True), (8, False))
        ),
        test_tuned.Nested(tile, None, 2),
    ]
    assert routing_rows.title("xla", tuned.encode(test_tuned.NESTED)) == (
        "xla sums.rows=8 sums.is_fused=True gradients=None cores=1"
    )


def test_given_config_is_used():
    def loops(config):
        """Return the lengths of the loops in the timed function."""
        function = routing_rows.function_of(Variant("xla", "forward", "float32", config), 2)
        equations = arithmetic.equations(function, *routing_rows.make_inputs(TINY))
        return {e.params["length"] for e, _ in equations if e.primitive.name == "scan"}

    assert 3 in loops(XlaConfig(children=2, examples=3))
    assert 3 not in loops(XlaConfig(children=6, examples=3))


def test_sweep_starts_from_the_default_config_of_every_implementation():
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
            assert benchmark_routing.neighbouring_configs(name, case)[0] == own


def test_least_work_equals_a_count_by_hand():
    # B=2 I=3 P=4 J=5 D=6: poses 24, weights 360, outputs 60; votes 1440, dots 360.
    case = Case(batch=2, capsules=3, length=4, parents=5, depth=6, num_iterations=3)
    forward = roofline.least_work(case, gradients=False)
    assert forward == (4 * (3 * 384 + 60), 3 * 1440 + 4 * 360)
    both = roofline.least_work(case, gradients=True)
    # 6 passes, outputs and cotangents, and both gradients written once.
    assert both.bytes == 4 * (6 * 384 + 2 * 60 + 384)
    # Backward: twice votes + 3·dots for the logits, then votes + 2·4·dots + 2·votes.
    assert both.flops == forward.flops + 2 * (1440 + 1080) + 1440 + 2880 + 2880
    half = roofline.least_work(case._replace(dtype="bfloat16"), gradients=True)
    assert (2 * half.bytes, half.flops) == both
    once = roofline.least_work(case._replace(num_iterations=1), gradients=True)
    assert once == (4 * (2 * 384 + 2 * 60 + 384), 3 * 1440)


def test_roofline_is_the_longer_of_traffic_and_arithmetic():
    peak = roofline.Peak(bytes=10.0, flops=100.0)
    assert roofline.Work(bytes=20, flops=100).seconds(peak) == 2
    assert roofline.Work(bytes=20, flops=1000).seconds(peak) == 10


def test_calls_are_timed_in_turn_in_long_rounds(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "ROUND_SECONDS", 10.0)

    def call(name, seconds):
        def start():
            calls.append(name)
            now[0] += seconds

        return timing.AsyncCall(start, wait=lambda result: None)

    times = timing.time_calls({"a": call("a", 4.0), "b": call("b", 20.0)}, repeats=3)
    assert times == {"a": (4, 4, 4, 3), "b": (20, 20, 20, 1)}
    assert "".join(calls).endswith("aaabaaabaaab")


def test_torch_without_its_package_is_an_input_error(monkeypatch):
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
        ({"scaling": "1,two"}, "^--scaling must be whole numbers from 1 to .*, got '1,two'$"),
        ({"scaling": "0"}, "^--scaling must be whole numbers from 1 to .*, got '0'$"),
        ({"tuned": "folder"}, "^--tuned needs --sweep, and gradients among --modes$"),
        ({"tuned": "folder", "sweep": True, "modes": "forward"}, "^--tuned needs --sweep, and"),
        ({"tuned": "/dev/null", "sweep": True}, "^/dev/null/cpu.json cannot be written: "),
        ({"output": "/dev/null/rows"}, "^/dev/null/rows cannot be written: File exists$"),
    ],
)
def test_bad_flags_are_input_errors(settings, message):
    with pytest.raises(InputError, match=message):
        main(Config(**{"cases": "tiny", **settings}))


# Figures


def rows(*names, cases=("tiny",), capsules=(8, 64, 100_000), dtypes=("float32",), reason=""):
    """Return rows of `measure_case`; with a reason, the first name has no times past 1,000."""
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
    "time": lambda: routing_speed.time_over_capsules(
        rows(*ALL, dtypes=("float32", "bfloat16"), reason="too large")
    ),
    "time, one point": lambda: routing_speed.time_over_capsules(rows("xla", capsules=(5,))),
    "roofline": lambda: routing_speed.roofline(
        rows(*ALL, cases=[*CASES], capsules=(8,), dtypes=("float32", "bfloat16"))
    ),
    "roofline, one": lambda: routing_speed.roofline(rows("xla", capsules=(5,))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_legible(name):
    test_figures.assert_legible(FIGURES[name]())


def test_lines_are_medians_and_crosses_are_rows_with_a_reason():
    figure = routing_speed.time_over_capsules(rows("reference", "xla", reason="too large"))
    for axes in figure.axes:
        stored, cross, fused = axes.get_lines()
        np.testing.assert_allclose(stored.get_xydata(), [(8, 0.016), (64, 0.128)])
        np.testing.assert_allclose(cross.get_xdata(), [100_000])
        np.testing.assert_allclose(fused.get_ydata(), [0.032, 0.256, 400])


def test_roof_bends_where_traffic_and_arithmetic_take_equally_long():
    (axes,) = routing_speed.roofline(rows("xla", capsules=(8,))).axes
    roof = axes.get_lines()[0].get_xydata()
    np.testing.assert_allclose(roof[:, 1], np.minimum(100, 20 * roof[:, 0]))
    assert roof[0, 1] < 100 == roof[-1, 1]
    points = [line.get_xydata()[0] for line in axes.get_lines()[1:]]
    np.testing.assert_allclose(points, [(7 * 12, 1), (7 * 14, 1)])


@pytest.mark.parametrize("draw", [routing_speed.time_over_capsules, routing_speed.roofline])
def test_figure_without_rows_is_an_error(draw):
    with pytest.raises(ValueError, match="rows must include one with a time, got none"):
        draw([])
