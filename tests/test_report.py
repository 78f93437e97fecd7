"""The report: the page shows what is in the folders of the runs, with all text escaped."""

import base64
import io
import json
import os
import re

import pytest
from PIL import Image
from reports import (
    ABSENT,
    HOSTILE,
    cells,
    metrics,
    parse,
    report_program,
    write_experiment,
    write_figure,
    write_rows,
    write_run,
)

program = pytest.fixture(report_program)


@pytest.fixture
def page(program, tmp_path):
    """Write a report on some workdirs and parses it."""

    def page(*workdirs):
        assert program(*workdirs) == (0, "")
        return parse((tmp_path / "report.html").read_text())

    return page


def tables(part):
    return [cells(table) for table in part.all("table")]


# What the page says


def test_errors_of_the_last_evaluation_stand_beside_epochs_steps_and_time(page, tmp_path):
    write_run(tmp_path / "a")
    rows = metrics()
    rows.append({"step": 250, "epoch": 2.5, "train_error": 1.0, "images_per_second": 1600.0})
    write_run(tmp_path / "b", rows=rows)
    write_run(tmp_path / "c", rows=rows[:1])
    (errors,) = tables(page("a", "b", "c").section("errors"))
    assert errors == [
        ["run", "test error, %", "epochs", "steps", "training time", "images/s"],
        ["a", "2.25", "2 of 4", "200", "4 s", "3200"],
        ["b", "2.25after epoch 2", "2.5 of 4", "250", "6 s", "3200"],
        ["c", "none yet", "0.5 of 4", "50", "1 s", "3200"],
    ]


def test_every_test_error_has_a_column(page, tmp_path):
    both = {"step": 7, "test_error_both": 30.125, "test_error_digit": 9.0}
    write_run(tmp_path / "multi", rows=[{"step": 3, "test_error_both": 1.0}, both])
    write_run(tmp_path / "single", rows=[{"step": 3, "test_error": 5.0}, {"step": 6}])
    (errors,) = tables(page("multi", "single").section("errors"))
    heads = ["test error both, %", "test error digit, %", "test error, %"]
    assert errors[0][1:4] == heads
    assert errors[1][:7] == ["multi", "30.12", "9.00", "none yet", ABSENT, "7", ABSENT]
    assert errors[2][:7] == [
        "single",
        "none yet",
        "none yet",
        "5.00after step 3",
        ABSENT,
        "6",
        ABSENT,
    ]


def test_absurd_steps_and_speeds_give_no_training_time(page, tmp_path):
    run = write_run(tmp_path / "a")
    write_rows(run, [{"step": 10**100, "images_per_second": 1e-100, "epoch": -1e100}])
    (errors,) = tables(page("a").section("errors"))
    assert errors[1][4] == ABSENT


def test_training_time_is_written_in_hours_minutes_and_seconds(page, tmp_path):
    row = {"step": 10_000, "epoch": 1.0, "images_per_second": 64.0}
    write_run(tmp_path / "a", rows=[row])
    write_run(tmp_path / "b", rows=[row | {"step": 90}])
    (errors,) = tables(page("a", "b").section("errors"))
    assert [row[4] for row in errors[1:]] == ["2 h 46 min", "1 min 30 s"]


def test_differing_settings_are_side_by_side_and_equal_ones_are_folded(page, tmp_path):
    write_run(tmp_path / "a", settings={"rate": 0.1 + 0.2, "shift": 2})
    write_run(tmp_path / "b", settings={"rate": 0.3, "download": True}, versions="0.12.0")
    write_run(tmp_path / "c", settings={"rate": 0.3, "shift": 2, "download": 1})
    settings = page("a", "b", "c").section("settings")
    differing, same = settings.all("table")
    assert cells(differing) == [
        ["setting", "a", "b", "c"],
        ["rate", "0.30000000000000004", "0.3", "0.3"],
        ["shift", "2", ABSENT, "2"],
        ["versions.jax", "0.10.2", "0.12.0", "0.10.2"],
        ["download", ABSENT, "true", "1"],
        ["workdir", *(str(tmp_path / name) for name in "abc")],
    ]
    marked = [[len(list(c.all("mark"))) for c in row.all("td")] for row in differing.all("tr")]
    assert marked[1:] == [[0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]]
    assert cells(same)[1:] == [
        ["dataset", "mnist_small"],
        ["batch_size", "64"],
        ["num_epochs", "4"],
        ["seed", "0"],
        ["data_sha256", "da7a"],
    ]
    (folded,) = settings.all("details")
    assert list(folded.all("table")) == [same]
    assert "open" not in folded.attributes


def test_many_runs_have_one_row_each_in_the_table_of_differing_settings(page, tmp_path):
    labels = [f"seed_{k}" for k in range(5)]
    for k, label in enumerate(labels):
        write_run(tmp_path / label, settings={"seed": k, "workdir": "same"})
    differing = next(page(*labels).section("settings").all("table"))
    assert cells(differing) == [["run", "seed"], *([f"seed_{k}", str(k)] for k in range(5))]
    marked = [mark.text for mark in differing.all("mark")]
    assert marked == ["1", "2", "3", "4"]


def test_one_run_has_no_table_of_differing_settings(page, tmp_path):
    write_run(tmp_path / "a")
    whole = page("a")
    assert next(whole.all("title")).text == "capsjax: 1 run"
    assert len(list(whole.section("settings").all("table"))) == 1


def test_each_measure_has_a_chart_of_all_runs_that_logged_it(page, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rows=[row | {"entropy": 2.0} for row in metrics(epochs=3)])
    curves = page("a", "b").section("curves")
    found = {}
    for figure in curves.all("figure"):
        (caption,) = figure.all("figcaption")
        found[caption.text] = [title.text for title in figure.all("title")]
    assert list(found) == ["test error, %", "test loss", "train error, %", "train loss", "entropy"]
    assert all(names == ["a", "b"] for title, names in found.items() if title != "entropy")
    assert found["entropy"] == ["b"]
    assert [item.text for item in curves.all("li")] == ["a", "b"]
    styles = [group.attributes["class"] for group in next(curves.all("figure")).all("g")]
    legend = [line.attributes["class"] for item in curves.all("li") for line in item.all("line")]
    assert styles == legend == ["c0 d0", "c1 d0"]


def test_curves_are_drawn_against_steps_if_a_run_logged_no_epochs(page, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rows=[{"step": 5, "train_loss": 1.0}])
    labels = {svg.attributes["aria-label"] for svg in page("a", "b").section("curves").all("svg")
              if "aria-label" in svg.attributes}  # fmt: skip
    assert "train loss against step, 2 curves" in labels
    assert "test error, % against step, 1 curve" in labels


def test_a_folder_stands_for_the_runs_in_it_and_seeds_share_a_colour(page, tmp_path):
    for variant in ("routing", "uniform"):
        for seed in (0, 2, 10):
            path = write_run(tmp_path / f"ablation/{variant}/seed_{seed}", settings={"seed": seed})
            write_figure(path, "couplings.png")
    (tmp_path / "ablation/results.json").write_text('[{"variant": "routing", "error": 1.25}]')
    write_figure(tmp_path / "ablation", "summary.png")
    write_run(tmp_path / "deep")
    whole = page("ablation")
    labels = [f"{v}/seed_{k}" for v in ("routing", "uniform") for k in (0, 2, 10)]
    assert [row[0] for row in tables(whole.section("errors"))[0][1:]] == labels
    legend = [item.text for item in whole.section("curves").all("li")]
    assert legend == ["routing (3 seeds)", "uniform (3 seeds)"]
    first = next(whole.section("curves").all("figure"))
    assert [g.attributes["class"] for g in first.all("g")] == ["c0 d0"] * 3 + ["c1 d0"] * 3
    results = whole.section("results")
    assert [head.text for head in results.all("h3")] == ["ablation"]
    assert tables(results) == [[["variant", "error"], ["routing", "1.25"]]]
    rows = [part for part in whole.section("figures").all("div") if part.attributes.get("class")]
    assert [[c.text for c in row.all("figcaption")] for row in rows] == [["ablation"], labels]
    beside = tables(page("ablation", "deep").section("errors"))[0][1:]
    assert [row[0] for row in beside] == [*(f"ablation/{label}" for label in labels), "deep"]


def test_figures_of_one_name_share_a_row_and_embed_the_files(page, tmp_path):
    write_run(tmp_path / "a", figures=("couplings.png", "tweaks_2.png", "tweaks_10.png"))
    write_run(tmp_path / "b", figures=("tweaks_2.png",))
    Image.new("L", (3, 2)).save(
        tmp_path / "b/figures/sweep.gif", save_all=True, append_images=[Image.new("L", (3, 2), 9)]
    )
    (tmp_path / "b/figures/notes.txt").write_text("not a figure")
    figures = page("a", "b").section("figures")
    assert [head.text for head in figures.all("h3")] == [
        *("couplings", "tweaks 2", "tweaks 10", "sweep")
    ]
    rows = [part for part in figures.all("div") if part.attributes.get("class") == "row"]
    shown = [[caption.text for caption in row.all("figcaption")] for row in rows]
    assert shown == [["a"], ["a", "b"], ["a"], ["b"]]
    for image in figures.all("img"):
        name, folder = image.attributes["alt"].split(" of ")
        kind, content = re.fullmatch(
            r"data:image/(\w+);base64,(.*)", image.attributes["src"]
        ).groups()
        assert name.endswith(kind)
        content = base64.b64decode(content, validate=True)
        assert content == (tmp_path / folder / "figures" / name).read_bytes()
        size = Image.open(io.BytesIO(content)).size
        assert size == (int(image.attributes["width"]), int(image.attributes["height"]))


def headings(part):
    return [head.text for head in part.all("h3")]


def captions(part):
    """Return the captions of the figures in each row."""
    rows = [row for row in part.all("div") if row.attributes.get("class") == "row"]
    return [[caption.text for caption in row.all("figcaption")] for row in rows]


def test_figures_beside_results_come_after_those_of_the_run(page, tmp_path):
    write_run(tmp_path / "a", figures=("tweaks.png", "couplings.png"))
    write_experiment(tmp_path / "a", "sweep_10.png", "effects.png", "sweep_9.png", results={"x": 1})
    Image.new("L", (3, 2)).save(tmp_path / "a/sweep_9.gif")
    (tmp_path / "a/sweep_9.json").write_text("not a figure")
    write_figure(write_run(tmp_path / "b"), "without_results.png", folder=".")
    figures = page("a", "b").section("figures")
    names = [image.attributes["alt"] for image in figures.all("img")]
    ordered = ("couplings.png", "tweaks.png", "effects.png", "sweep_9.gif", "sweep_9.png",
               "sweep_10.png")  # fmt: skip
    assert names == [f"{name} of a" for name in ordered]
    content = next(image for image in figures.all("img") if "effects" in image.attributes["alt"])
    uri = base64.b64encode((tmp_path / "a/effects.png").read_bytes()).decode()
    assert content.attributes["src"] == f"data:image/png;base64,{uri}"


def test_an_experiment_is_shown_beside_runs_and_not_counted_as_one(page, tmp_path):
    write_run(tmp_path / "runs/capsnet")
    write_run(tmp_path / "runs/cnn", figures=("sweeps.png",))
    write_run(tmp_path / "runs/ablation/routing", figures=("couplings.png",))
    for name in ("ablation", "affine"):
        write_experiment(tmp_path / "runs" / name, "sweeps.png", results=[{"run": name}])
    whole = page(*(f"runs/{name}" for name in ("capsnet", "affine", "cnn", "ablation")))
    labels = ["capsnet", "cnn", "ablation/routing"]
    assert next(whole.all("title")).text == "capsjax: 3 runs"
    assert [row[0] for row in tables(whole.section("errors"))[0][1:]] == labels
    assert [item.text for item in whole.section("curves").all("li")] == labels
    results = whole.section("results")
    assert headings(results) == ["affine", "ablation"]
    assert tables(results) == [[["run"], ["affine"]], [["run"], ["ablation"]]]
    assert headings(whole.section("figures")) == ["sweeps", "couplings"]
    assert captions(whole.section("figures")) == [["affine", "cnn", "ablation"], labels[2:]]


def test_an_experiment_alone_has_only_results_and_figures(page, tmp_path):
    write_experiment(tmp_path / "runs/affine", "sweeps.png", results=[{"error": 1.5}])
    write_figure(tmp_path / "runs/affine", "more.png")
    whole = page("runs/affine")
    assert [next(whole.all(tag)).text for tag in ("title", "h1")] == ["capsjax: results"] * 2
    assert [link.text for link in whole.all("a")] == ["Results", "Figures"]
    assert [part.attributes["id"] for part in whole.all("section")] == ["results", "figures"]
    assert headings(whole.section("results")) == ["affine"]
    assert tables(whole) == [[["error"], ["1.5"]]]
    assert headings(whole.section("figures")) == ["more", "sweeps"]
    assert captions(whole.section("figures")) == [["affine"], ["affine"]]


def test_an_experiment_that_is_the_working_directory_is_named_after_it(page, tmp_path):
    write_experiment(tmp_path, results={"x": 1})
    assert headings(page(".").section("results")) == [tmp_path.name]


def test_the_log_says_how_many_runs_the_page_shows(program, tmp_path, caplog):
    write_run(tmp_path / "a")
    write_experiment(tmp_path / "affine", results={"x": 1})
    with caplog.at_level("INFO", "absl"):
        for workdirs in (["a", "affine"], ["affine"]):
            assert program(*workdirs) == (0, "")
    assert caplog.messages == ["report.html shows 1 run", "report.html shows results"]


@pytest.mark.parametrize(
    ("results", "table"),
    [
        (
            [{"angle": 0, "error": 1.23456789}, {"angle": 30, "note": "far"}],
            [["angle", "error", "note"], ["0", "1.2346", ABSENT], ["30", ABSENT, "far"]],
        ),
        (
            {"capsnet": {"stability": 0.5}, "cnn": {"stability": 123456.7, "of": {"x": None}}},
            [["", "stability", "of.x"], ["capsnet", "0.5", ABSENT], ["cnn", "123457", ABSENT]],
        ),
        (
            {
                "stability": 1e-9,
                "decoded": {"angle": 0.75},
                "seeds": [0, 1],
                "done": False,
                "note": "",
            },
            [
                ["name", "value"],
                ["stability", "1e-09"],
                ["decoded.angle", "0.75"],
                ["seeds", "[0, 1]"],
                ["done", "false"],
                ["note", "(empty)"],
            ],
        ),
    ],
)
def test_results_are_a_table(page, tmp_path, results, table):
    write_run(tmp_path / "a", results=results)
    assert tables(page("a").section("results")) == [table]


# What the page is


def test_the_page_is_self_contained_and_reproducible(program, tmp_path):
    write_run(tmp_path / "a", figures=("couplings.png",), results={"x": 1})
    assert program("a") == (0, "")
    text = (tmp_path / "report.html").read_text()
    whole = parse(text)
    for element in whole.all(*(set(re.findall(r"<(\w+)", text)))):
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/", "#"))
    assert "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert "@import" not in text
    assert "url(" not in text
    targets = {element.attributes["id"] for element in whole.all("section")}
    assert {f"#{key}" for key in targets} == {a.attributes["href"] for a in whole.all("a")}
    (policy,) = [m.attributes["content"] for m in whole.all("meta") if "http-equiv" in m.attributes]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert program("a") == (0, "")
    assert (tmp_path / "report.html").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["a", "report.html"]


def test_text_from_files_is_escaped(page, tmp_path):
    bad = f"{HOSTILE}\x00\x1b\ud800"
    row = {"step": 1, bad: 1.0, f"test_error{HOSTILE}": 1.0}
    name = HOSTILE.replace("/", "")
    path = write_run(tmp_path / name, settings={bad: bad, "x": bad}, rows=[row], results={bad: bad})
    write_figure(path, f"{name}.png")
    write_run(tmp_path / "b", settings={"x": [bad]})
    whole = page(name, "b")
    assert not list(whole.all("script"))
    shown = HOSTILE + r"\x00\x1b\ud800"
    settings = [row for table in tables(whole.section("settings")) for row in table]
    assert [
        "x",
        shown,
        json.dumps([bad], ensure_ascii=False).replace("\ud800", r"\ud800"),
    ] in settings
    assert tables(whole.section("results")) == [[["name", "value"], [shown, shown]]]
    assert tables(whole.section("errors"))[0][0][1] == f"test error{HOSTILE}, %".replace("_", " ")
    assert [c.text for c in whole.section("figures").all("figcaption")] == [name]
    assert shown in [c.text for c in whole.section("curves").all("figcaption")]


def test_nothing_in_a_workdir_is_changed(program, tmp_path):
    path = write_run(tmp_path / "a", figures=("couplings.png",))
    before = {entry: entry.stat().st_mtime_ns for entry in [path, *path.rglob("*")]}
    assert program("a")[0] == 0
    assert {entry: entry.stat().st_mtime_ns for entry in [path, *path.rglob("*")]} == before


def test_a_failed_write_leaves_the_old_report(program, tmp_path, small_disk):
    write_run(tmp_path / "a")
    (tmp_path / "report.html").write_text("old")
    with small_disk(100):
        status, stderr = program("a")
    assert (status, stderr) == (2, "report: report.html cannot be written: File too large\n")
    assert (tmp_path / "report.html").read_text() == "old"
