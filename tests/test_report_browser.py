"""The report as a reader sees it: in a browser, from disk, on a phone and on a screen."""

import io
import shutil

import numpy as np
import pytest
from browser import PROGRAM, browser
from PIL import Image
from reports import HOSTILE, metrics, write_figure, write_run

from experiments import report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a browser (Debian: chromium)")

DARK = [{"name": "prefers-color-scheme", "value": "dark"}]
CUT = """[...document.querySelectorAll('.scroll, .row, .row label')].filter(
    e => getComputedStyle(e).overflowX != 'visible').length"""
LONG = "a_name_without_a_place_to_break_it_" * 4


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page is that has everything: many runs, long names, wide tables and figures."""
    folder = tmp_path_factory.mktemp("report")
    for variant in ("routing", LONG):
        for seed in range(4):
            path = write_run(
                folder / f"ablation/{variant}/seed_{seed}",
                settings={"seed": seed, "note": LONG + HOSTILE, LONG: seed},
                rows=metrics(epochs=3 + seed, errors=(len(variant) / 9 + 1, 2)),
                results=[{f"{LONG}{k}": k for k in range(9)}] * 2,
            )
            write_figure(path, "learning_curves.png", size=(7.2, 2.8))
            write_figure(path, f"{LONG}.png", size=(1, 0.5))
    write_run(
        folder / "single",
        rows=metrics(errors=(9, 8)),
        figures=("learning_curves.png",),
        results={"x": HOSTILE},
    )
    output = folder / "report.html"
    workdirs = f"{folder / 'ablation'},{folder / 'single'}"
    assert report.main(report.Config(workdirs=workdirs, output=str(output))) == 0
    return output.as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with browser(profile) as tab:
        yield tab
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(params=[(360, "light"), (360, "dark"), (1280, "light"), (1600, "dark")], ids=str)
def opened(request, chromium, address):
    width, scheme = request.param
    chromium.open(address, width=width, scheme=scheme)
    return chromium


def test_it_opens_without_an_error_and_without_the_network(opened, address):
    assert opened.evaluate("document.title") == "capsjax: 9 runs"
    for event in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert not opened.events[event]
    fetched = [event["request"]["url"] for event in opened.events["Network.requestWillBeSent"]]
    assert [url for url in fetched if not url.startswith("data:image/png;base64,")] == [address]
    assert not opened.events["Network.loadingFailed"]


def test_every_image_is_there(opened):
    sizes = opened.evaluate(
        "[...document.images].map("
        "i => [i.complete, i.naturalWidth, i.width, Number(i.getAttribute('width'))])"
    )
    assert len(sizes) == 17
    for complete, natural, width, declared in sizes:
        assert complete
        assert natural == declared > 0
        assert 0 < width <= natural


def test_nothing_is_wider_than_the_window(opened):
    width = opened.evaluate("innerWidth")
    opened.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    # What is wider scrolls by itself; nothing else goes over the edge.
    beyond = """[...document.querySelectorAll('body *')].filter(
        e => !e.closest('.scroll *, .row *') && e.getBoundingClientRect().right > innerWidth + 0.5
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert opened.evaluate(beyond) == []


def test_text_is_large_enough(opened):
    sizes = """[...document.querySelectorAll('body, td, th, li, p, small, figcaption, text')].map(
        e => parseFloat(getComputedStyle(e).fontSize) * (e.getScreenCTM?.().a ?? 1))"""
    assert min(opened.evaluate(sizes)) >= 10


def test_what_is_drawn_stands_out(opened):
    colours = """[...document.querySelectorAll('%s')].map(e => [getComputedStyle(e).%s,
        getComputedStyle(e.closest('mark, thead th') || document.body).backgroundColor])"""
    for selector, kind, least in (
        ("body, p, nav a, mark, thead th, td, small", "color", 4.5),
        ("svg text", "fill", 4.5),
        ("polyline", "stroke", 3),
    ):
        found = {tuple(pair) for pair in opened.evaluate(colours % (selector, kind))}
        assert found
        for pair in found:
            dark, light = sorted(map(_luminance, pair))
            assert (light + 0.05) / (dark + 0.05) >= least, (selector, pair)


def test_curves_are_drawn_in_their_colours(opened):
    place = opened.evaluate(
        "(e => [e.x + scrollX, e.y + scrollY, e.width, e.height].map(Math.round))"
        "(document.querySelector('.charts svg').getBoundingClientRect())"
    )
    left, top, width, height = place
    page = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
    chart = np.asarray(page.crop((left, top, left + width, top + height)), int)
    lines = "document.querySelector('.charts svg').querySelectorAll('polyline')"
    colours = set(opened.evaluate(f"[...{lines}].map(e => getComputedStyle(e).stroke)"))
    assert len(colours) == 3
    for colour in colours:
        distance = np.abs(chart - _channels(colour)).sum(axis=-1)
        assert (distance < 30).sum() > 5


def test_a_click_shows_a_figure_in_its_own_size(chromium, address):
    chromium.open(address, width=360)
    shown = "[...document.images].filter(i => i.width < i.naturalWidth).length"
    before = chromium.evaluate(shown)
    assert before > 0
    chromium.evaluate("[...document.images].find(i => i.width < i.naturalWidth).click()")
    assert chromium.evaluate(shown) == before - 1
    assert chromium.evaluate("document.documentElement.scrollWidth") == 360


def test_text_of_the_files_is_never_run(chromium, address):
    chromium.open(address, width=1280)
    assert chromium.evaluate("document.scripts.length") == 0
    assert chromium.evaluate("document.title") == "capsjax: 9 runs"
    assert HOSTILE in chromium.evaluate("document.querySelector('#results').textContent")


def test_it_prints_light_with_everything_that_is_folded(chromium, address):
    chromium.open(address, width=1280, scheme="dark")
    seen = "document.querySelector('details table').checkVisibility()"
    assert not chromium.evaluate(seen)
    chromium.resize(750)
    chromium.call("Emulation.setEmulatedMedia", media="print", features=DARK)
    try:
        assert chromium.evaluate(seen)
        colour = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
        width = chromium.evaluate("document.documentElement.scrollWidth")
        cut = chromium.evaluate(CUT)
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")
    assert cut == 0
    assert colour == "rgb(255, 255, 255)"
    assert width == 750


def _channels(colour):
    return [int(value) for value in colour.removeprefix("rgb(").removesuffix(")").split(", ")]


def _luminance(colour):
    """Relative luminance by WCAG 2.1."""
    values = np.array(_channels(colour)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
