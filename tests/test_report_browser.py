"""The report as a reader sees it: in Chromium, from disk, on a phone, on a screen and in print."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from reports import HOSTILE, metrics, write_figure, write_run

from experiments import report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium on the PATH (Debian: apt install chromium)"
)

LONG = "a_name_without_a_place_to_break_it_" * 4


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The URL of a page with everything: many runs, long names, wide tables and figures."""
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
        rows=[row | {HOSTILE: 1.0} for row in metrics(errors=(9, 8))],
        figures=("learning_curves.png",),
        results={"x": HOSTILE},
    )
    output = folder / "report.html"
    workdirs = f"{folder / 'ablation'},{folder / 'single'}"
    assert report.main(report.Config(workdirs=workdirs, output=str(output))) == 0
    return output.as_uri()


@pytest.fixture(scope="module")
def chromium():
    """One headless Chromium for this file: while it lives, no other event loop can run."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=False,  # the sandbox refuses to start as root
            args=["--disable-dev-shm-usage"],  # a container's /dev/shm may be small
        )
        with browser:
            yield browser


@pytest.fixture
def tab(chromium):
    """An empty tab, for tests that act on the page."""
    with chromium.new_page(viewport={"width": 360, "height": 800}) as tab:
        yield tab


@pytest.fixture(scope="module")
def shared_tab(chromium):
    with chromium.new_page() as tab:
        yield tab


@pytest.fixture(
    scope="module",
    params=[(360, "light"), (360, "dark"), (1280, "light"), (1600, "dark")],
    ids="{0[0]}-{0[1]}".format,
)
def opened(request, shared_tab, address):
    """The page at some width and colour scheme, for tests that leave it as it is."""
    width, scheme = request.param
    shared_tab.set_viewport_size({"width": width, "height": 800})
    shared_tab.emulate_media(color_scheme=scheme)
    shared_tab.goto(address)
    return shared_tab


def test_it_opens_without_an_error_and_without_the_network(tab, address):
    messages, requests = [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("requestfailed", lambda request: messages.append(request.url))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    assert messages == []
    assert requests == [address]


def test_text_from_files_is_shown_and_never_run(opened):
    assert opened.title() == "capsjax: 9 runs"
    assert opened.locator("script").count() == 0
    for place in ("#results td", "#curves figcaption"):
        assert HOSTILE in opened.locator(place).all_inner_texts()


def test_every_image_is_shown(opened):
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
    # Wide tables and figures scroll inside their own boxes.
    beyond = """[...document.querySelectorAll('body *')].filter(
        e => !e.closest('.scroll *, .row *') && e.getBoundingClientRect().right > innerWidth + 0.5
    ).map(e => e.outerHTML.slice(0, 80))"""
    opened.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    try:
        assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
        assert opened.evaluate(beyond) == []
    finally:
        opened.evaluate("document.querySelectorAll('details').forEach(e => e.open = false)")


def test_text_is_at_least_10_pixels_high(opened):
    sizes = """[...document.querySelectorAll('body, td, th, li, p, small, figcaption, text')].map(
        e => parseFloat(getComputedStyle(e).fontSize) * (e.getScreenCTM?.().a ?? 1))"""
    assert min(opened.evaluate(sizes)) >= 10


@pytest.mark.parametrize(
    ("selector", "kind", "least"),
    [
        ("body, p, nav a, mark, thead th, td, small", "color", 4.5),
        ("svg text", "fill", 4.5),
        ("polyline", "stroke", 3),
    ],
)
def test_text_and_curves_have_the_contrast_that_wcag_asks_for(opened, selector, kind, least):
    colours = f"""[...document.querySelectorAll('{selector}')].map(e => [getComputedStyle(e).{kind},
        getComputedStyle(e.closest('mark, thead th') || document.body).backgroundColor])"""
    found = {tuple(pair) for pair in opened.evaluate(colours)}
    assert found
    for pair in found:
        dark, light = sorted(map(_luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= least, pair


def test_curves_are_drawn_in_their_colours(opened):
    shot = opened.locator(".charts svg").first.screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), int)
    lines = "document.querySelector('.charts svg').querySelectorAll('polyline')"
    colours = set(opened.evaluate(f"[...{lines}].map(e => getComputedStyle(e).stroke)"))
    assert len(colours) == 3
    for colour in colours:
        distance = np.abs(pixels - _channels(colour)).sum(axis=-1)
        assert (distance < 30).sum() > 5


def test_a_click_or_the_space_key_shows_a_figure_at_full_size(tab, address):
    tab.goto(address)
    shrunk = "[...document.images].map(i => i.width < i.naturalWidth)"
    before = tab.evaluate(shrunk)
    first = before.index(True)
    tab.locator("img").nth(first).click()
    enlarged = [is_shrunk and k != first for k, is_shrunk in enumerate(before)]
    assert tab.evaluate(shrunk) == enlarged != before
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.locator("input").nth(first).press("Space")
    assert tab.evaluate(shrunk) == before


def test_it_prints_light_unfolded_and_with_nothing_cut_off(tab, address):
    tab.set_viewport_size({"width": 750, "height": 800})
    tab.emulate_media(color_scheme="dark")
    tab.goto(address)
    folded = tab.locator("details table")
    assert not folded.is_visible()
    tab.emulate_media(media="print")
    assert folded.is_visible()
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") == 750
    scrolling = """[...document.querySelectorAll('.scroll, .row, .row label')].filter(
        e => getComputedStyle(e).overflowX != 'visible').length"""
    assert tab.evaluate(scrolling) == 0


def _channels(colour):
    return [int(value) for value in colour.removeprefix("rgb(").removesuffix(")").split(", ")]


def _luminance(colour):
    """Return the relative luminance defined by WCAG 2.1."""
    values = np.array(_channels(colour)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
