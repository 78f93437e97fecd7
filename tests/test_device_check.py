"""Tests of `device_check`: a dry run, wrong values, refusals, errors and the time limit."""

import json
import re
import types

import in_process
import jax
import numpy as np
import pytest

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.cases import CASES, Case
from experiments import device_check
from experiments.benchmarks import exactness, roofline, routing_times, timing
from experiments.benchmarks.exactness import Problem
from experiments.errors import InputError

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Case(batch=3, capsules=6, length=4, parents=3, depth=5, num_iterations=2)
KIND = jax.devices()[0].device_kind


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Check one small problem, time one small case, and shrink probes and rounds."""
    monkeypatch.setitem(CASES, "tiny", TINY)
    problems = {"tiny": Problem(TINY, prior="IJ", is_masked=True, bias=True, mask=True)}
    monkeypatch.setattr(device_check, "PROBLEMS", problems)
    monkeypatch.setattr(device_check, "TIMED", (("tiny", "float32"),))
    monkeypatch.setattr(roofline, "TRIAD_SIZE", 1024)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Return a function that runs the program: its exit status, rows, stdout and stderr."""

    def run(**flags):
        output = tmp_path / "rows.jsonl"
        flags = {"dry": "true", "output": output, **flags}
        status, out, err = in_process.run(device_check, flags, monkeypatch, capsys)
        lines = output.read_text().splitlines() if output.exists() else []
        return status, [json.loads(line) for line in lines], out, err

    return run


def lines_with(text, word):
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if word in line]


def test_dry_run_writes_and_prints_every_stage(run, tmp_path):
    floors = tmp_path / "floors.jsonl"
    row = {"target": "here", "case": "tiny", "implementation": "xla", "gradients": True}
    floors.write_text(json.dumps({**row, "sizes": TINY._asdict(), "floor_us": 1.25}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(routing_times.TARGETS, "here", types.SimpleNamespace(device=KIND))
        status, rows, out, _ = run(floors=floors)
    assert status == 0, out
    stages = {name: [row for row in rows if row["stage"] == name] for name in device_check.STAGES}
    (environment,) = stages["environment"]
    assert environment["gb_per_second"] > 0
    assert (environment["device"], environment["kernels"]) == (KIND, "xla")
    values = stages["values"]
    assert [(row["function"], row["dtype"], row["precision"]) for row in values] == [
        (function, dtype, precision)
        for function in ("routing", "passes", "couplings")
        for dtype, precision in (
            *(("float32", precision) for precision in (None, "high", "highest")),
            ("bfloat16", None),
        )
    ]
    assert all(row["ok"] and row["same_bits"] and not row["wrong"] for row in values)
    inputs = {"d_poses", "d_weights", "d_prior"}
    assert values[0]["errors"].keys() == inputs | {"outputs", "d_bias"}
    sums = {"moments", "first_moments", "chain"}
    assert values[4]["errors"].keys() == inputs | sums | {"d_gates"}
    assert values[8]["errors"].keys() == {"couplings"}
    for row in values:  # compared with float64, so that float32 has an error too
        assert 1e-9 < max(row["errors"].values()) < 100 * jax.numpy.finfo(row["dtype"]).eps
    times = {(row["implementation"], row["mode"]): row for row in stages["times"]}
    assert len(times) == 4
    assert all(0 < row["min_us"] <= row["us"] <= row["max_us"] for row in times.values())
    assert {key: row["floor_us"] for key, row in times.items()} == {
        **dict.fromkeys(times),
        ("xla", "gradients"): 1.25,
    }
    stored, fused = times["reference", "forward"], times["xla", "forward"]
    assert fused["speedup"] == stored["us"] / fused["us"]
    (line,) = lines_with(out, "tiny float32 xla gradients")
    assert " 1.2 " in line
    assert lines_with(out, "values: ") == ["values: 12 right"]
    assert len(lines_with(out, "routing tiny float32 highest right")) == 1


def test_wrong_values_are_named_and_the_exit_status_is_1(run, monkeypatch):
    def make(problem, implementation):
        def function(arrays, *others):
            is_wrong = implementation != "reference" and arrays["poses"].dtype == "float32"
            return {"poses": arrays["poses"] * (1.1 if is_wrong else 1)}

        return function

    monkeypatch.setattr(exactness, "FUNCTIONS", {"copies": make})
    status, rows, out, _ = run(stages="values")
    assert status == 1
    assert [row["ok"] for row in rows] == [False, False, False, True]
    assert [row["wrong"] for row in rows] == [["poses"], ["poses"], ["poses"], []]
    assert rows[0]["errors"]["poses"] == pytest.approx(0.1, rel=1e-4)
    assert lines_with(out, "failed: ") == [
        "failed: values copies tiny xla float32: poses has error 1e-01",
        "failed: values copies tiny xla float32 high: poses has error 1e-01",
        "failed: values copies tiny xla float32 highest: poses has error 1e-01",
    ]


def test_values_that_are_not_finite_or_differ_in_a_second_run_are_wrong():
    ones = np.ones(3)

    def compare(first, second):
        runs = iter([first, second])
        under_test, stored = [lambda: {"x": next(runs)}], [lambda: {"x": ones}]
        row = exactness.compare(exactness.Programs((), under_test, stored, lambda: {"x": ones}), 0)
        return row["ok"], row["same_bits"], row["wrong"], row["errors"]["x"]

    assert compare(ones, ones) == (True, True, [], 0)
    assert compare(np.nan * ones, np.nan * ones) == (False, True, ["x"], None)
    assert compare(ones, ones + 1e-9) == (False, False, [], 0)


def test_refusals_and_errors_are_rows_and_the_run_goes_on(run, monkeypatch):
    def make(problem, implementation):
        def refuse(arrays, *others):
            if implementation != "reference":
                raise Unsupported("no prior")
            return {"poses": arrays["poses"]}

        return refuse

    def crash(problem, implementation):
        def function(arrays, *others):
            if implementation != "reference" and arrays["poses"].dtype == "bfloat16":
                raise RuntimeError("out of\nregisters")
            return {"poses": arrays["poses"]}

        return function

    monkeypatch.setattr(exactness, "FUNCTIONS", {"refused": make, "crashed": crash})
    status, rows, out, _ = run(stages="values")
    assert status == 1
    assert [row.get("refused") for row in rows] == ["no prior"] * 4 + [None] * 4
    assert [row.get("error") for row in rows] == [*[None] * 7, "RuntimeError: out of registers"]
    assert [row.get("ok") for row in rows] == [None] * 4 + [True, True, True, None]
    assert "\nrefused tiny xla: no prior\n" in out
    assert lines_with(out, "values: ") == ["values: 4 refused, 3 right, 1 ended by an error"]
    (line,) = lines_with(out, "failed: ")
    assert line == "failed: values crashed tiny xla bfloat16: RuntimeError: out of registers"


def test_refusals_alone_are_no_failure(run, monkeypatch):
    def make(problem, implementation):
        raise Unsupported("nothing")

    monkeypatch.setattr(exactness, "FUNCTIONS", {"refused": make})
    assert run(stages="values")[0] == 0


def test_implementations_that_cannot_be_timed_are_rows(run, monkeypatch):
    compile_variant = routing_times.routing_rows.compile_variant

    def compile_some(variant, *arguments):
        if variant.implementation == "reference":
            raise routing_times.NotMeasured("too large")
        if variant.mode == "forward":
            raise RuntimeError("a bug")
        return compile_variant(variant, *arguments)

    monkeypatch.setattr(routing_times.routing_rows, "compile_variant", compile_some)
    status, rows, out, _ = run(stages="times")
    assert status == 1
    kinds = [{"us", "reason", "error"} & row.keys() for row in rows]
    assert kinds == [{"us"}, {"reason"}, {"error"}, {"reason"}]
    assert all("speedup" not in row for row in rows)
    assert "\ntiny reference gradients, tiny reference forward: too large\n" in out


def test_torch_that_is_not_installed_is_a_row(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, (row,), out, _ = run(stages="torch")
    assert (status, row["reason"]) == (0, "--torch needs PyTorch: pip install torch")
    assert "torch: 1 not measured" in out


def test_no_row_is_started_that_would_end_after_the_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(device_check.time, "perf_counter", lambda: now[0])
    recorder = device_check.Recorder("", limit=100)
    recorder.begin("values")  # half of the limit
    assert recorder.has_time("first")
    now[0] = 20.0
    assert recorder.has_time("second")
    now[0] = 31.0  # the longest row took 20 s, and 19 s are left
    assert not recorder.has_time("third")
    (row,) = recorder.rows
    assert (row["stage"], row["case"]) == ("values", "third")
    assert row["reason"].startswith("not started, nor what comes after it")
    recorder.begin("times")
    assert recorder.has_time("first of the next stage")


def test_once_calls_outputs_and_gradients_three_times(run, monkeypatch):
    calls = []

    def make(problem, implementation):
        def function(arrays, *others):
            jax.debug.callback(lambda: calls.append((implementation, *arrays)))
            return arrays["poses"]

        return function

    monkeypatch.setattr(exactness, "routing", make)
    config = device_check.Config(once="tiny", dry=True)
    assert device_check.main(config) == 0
    jax.effects_barrier()
    assert calls == [("xla", "bias", "poses", "prior", "weights")] * 3


def test_without_an_accelerator_it_says_so_and_exits_with_2(run):
    status, rows, out, err = run(dry="false")
    assert (status, rows, out) == (2, [], "")
    assert err == (
        f"device_check: no accelerator with kernels is here, only a {KIND}; "
        "--dry checks this program without one\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stages": "values,speed"}, r"--stages must be among environment, .*, got 'speed'\n$"),
        ({"once": "mnist"}, r"--once must be one of .*, got 'mnist'\n$"),
        ({"limit": 0}, r"--limit must be above 0, got 0.0\n$"),
        ({"floors": "/missing"}, r"--floors: /missing cannot be read: No such file"),
        ({"output": "/dev/null/rows"}, r"/dev/null/rows cannot be written: "),
    ],
)
def test_bad_flags_are_input_errors(flags, message, monkeypatch, capsys):
    flags = {"dry": "true", "stages": "torch", **flags}
    status, _, err = in_process.run(device_check, flags, monkeypatch, capsys)
    assert status == 2
    assert re.search(message, err), err


@pytest.mark.parametrize("line", ["{", "[]", '{"floor_us": 1}', '{"floor_us": 1, "target": "x"}'])
def test_a_file_that_is_no_compile_report_is_an_input_error(line, tmp_path):
    path = tmp_path / "floors.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=f"^--floors: {path} is no compile report: "):
        routing_times.read_floors(str(path))


def test_kernels_are_those_of_the_platform(monkeypatch):
    for platform, kernels in {"cuda": "triton", "tpu": "mosaic_tpu"}.items():
        monkeypatch.setattr(device_check.routing_rows, "platforms", lambda p=platform: {"gpu", p})
        assert device_check.kernels_of_this_platform() == kernels


# Problems


def test_problems_have_every_option_and_size_of_the_engine():
    problems = exactness.PROBLEMS.values()
    for name, default in Problem._field_defaults.items():
        assert {getattr(problem, name) for problem in problems} > {default}
    assert {problem.prior for problem in problems} == {"", "IJ", "BIJ"}
    assert {problem.case.num_iterations for problem in problems} == {1, 3, 5}
    for name, problem in exactness.PROBLEMS.items():
        assert max(device_check.shrink(problem.case)[:6]) <= 20, name
        assert name in device_check.Config.__dataclass_fields__["once"].metadata["help"]


def test_masked_logits_leave_some_children_without_a_parent():
    arrays, masks, *_ = exactness.arguments(Problem(TINY, "BIJ", True, parent_mask=True))
    unreachable = np.all(arrays["prior"] == -np.inf, axis=2)
    assert unreachable.any()
    assert not unreachable.all()
    assert masks["parent_mask"].any(axis=1).all()


def test_free_memory_is_filled_up_to_a_fifth(monkeypatch):
    sizes = []
    device = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 11 * 2**30, "bytes_in_use": 2**30}
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.numpy, "full", lambda size, *rest: sizes.append((size, *rest)))
    exactness.poison_free_memory()
    assert [4 * size for size, *_ in sizes] == [2**30] * 8
    assert all(np.isnan(value) for _, value, _ in sizes)


# Timing


def test_calls_in_one_program_wait_for_each_other():
    def function(x, y):
        return jax.numpy.sin(x) * y

    ones = jax.numpy.ones(4)
    program = jax.jit(timing.one_after_another(function))
    sets = [(k * ones, ones) for k in range(3)]
    for (x, y), result in zip(sets, program(*sets), strict=True):
        np.testing.assert_allclose(result, np.sin(x) * y, rtol=1e-6)
    text = program.lower(*sets).as_text()
    assert text.count("stablehlo.optimization_barrier") == 2


def test_inputs_in_turn_exceed_the_caches(monkeypatch):
    monkeypatch.setattr(routing_times, "INPUT_BYTES", 5000)
    sets = routing_times.inputs_in_turn(TINY)
    each = sum(x.nbytes for x in sets[0])
    assert (len(sets) - 1) * each < 5000 <= len(sets) * each
    assert not np.array_equal(sets[0].poses, sets[1].poses)
    assert len(routing_times.inputs_in_turn(TINY, most=2)) == 2


def test_passes_under_test_are_those_of_the_implementation(monkeypatch):
    used = set()
    bind = passes._bind

    def record(primitive, implementation, *trees, **static):
        used.add((primitive.name, implementation.name))
        return bind(primitive, implementation, *trees, **static)

    monkeypatch.setattr(passes, "_bind", record)
    problem = Problem(TINY)
    for make in (exactness.all_passes, exactness.couplings):
        jax.eval_shape(make(problem, "xla"), *exactness.arguments(problem))
    names = {"moments", "chain", "input_gradients", "couplings"}
    assert used == {(name, "xla") for name in names}
