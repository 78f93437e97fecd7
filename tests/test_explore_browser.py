"""explore as a person uses it, in Chromium: draw, drag, drop, read; and what it connects to."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect, sync_playwright
from small_runs import QUICK

ROOT = pathlib.Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium on the PATH (Debian: apt install chromium)"
)

# Python runs it in the program's process first: it notes every address that is asked for.
AUDIT = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        where = arguments[1] if event == "socket.connect" else arguments[0]
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(where[0] if isinstance(where, tuple) else where, file=file)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program's address, its process, and the file of the addresses that it asks for."""
    folder = tmp_path_factory.mktemp("explore")
    (folder / "sitecustomize.py").write_text(AUDIT)
    connections = folder / "connections"
    environment = {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "CONNECTIONS": str(connections),
        "GRADIO_ANALYTICS_ENABLED": "True",  # the program's own setting holds
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.explore", "--port=0"],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            line = process.stderr.readline()
            found = re.search(r"small\.safetensors: open (http://127\.0\.0\.1:\d+/) in", line)
            assert found, line
            yield found[1], process, connections
        finally:
            process.kill()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=False,  # the sandbox refuses to start as root
            args=["--disable-dev-shm-usage"],  # a container's /dev/shm may be small
        )
        with browser:
            yield browser


@pytest.fixture(params=[360, 1200])
def tab(request, chromium, program):
    """The page, which must ask only its own address for anything, and log no error."""
    problems, requests = [], []
    with chromium.new_page(viewport={"width": request.param, "height": 800}) as tab:
        tab.on("console", lambda message: message.type == "error" and problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda asked: requests.append(asked.url))
        tab.goto(program[0])
        yield tab
        assert problems == []
        assert len(requests) > 5
        others = [url for url in requests if not url.startswith((program[0], "data:", "blob:"))]
        assert others == []


def draw_seven(tab):
    """Draw with the mouse, and leave the button down."""
    canvas = tab.locator("#drawing canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for number, (x, y) in enumerate([(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)]):
        tab.mouse.move(
            box["x"] + x * box["width"], box["y"] + y * box["height"], steps=1 + 5 * number
        )
        tab.mouse.down()


def drag(tab, slider, place):
    """Drag a slider's knob from its middle to a place, 0 to 1, and leave the button down."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + box["width"] / 2, middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + place * box["width"], middle, steps=5)


def test_draw_drag_and_read(tab):
    says = tab.locator(".says")
    expect(says).to_have_text(re.compile("^Draw one digit"))
    draw_seven(tab)
    # The mouse is still down: bars follow the drawing.
    winner = tab.locator("#bars .winner")
    expect(winner).to_have_text(re.compile(r"7\s*0\.9\d"))
    tab.mouse.up()
    rows = tab.locator("#bars tr")
    assert rows.count() == 10
    tab.wait_for_timeout(400)  # for the answer to the last part of the drawing
    bar = winner.locator("i").evaluate("e => parseFloat(e.style.width)")
    assert bar == pytest.approx(100 * float(winner.locator("td").last.inner_text()), abs=0.6)

    changed = tab.get_by_alt_text("with changes")
    before = changed.get_attribute("src")
    assert before == tab.get_by_alt_text("without changes").get_attribute("src")
    sliders = tab.locator("#dimensions input[type=range]")
    assert sliders.count() == 16
    drag(tab, sliders.nth(3), 0.98)
    expect(changed).not_to_have_attribute("src", before)
    # The picture stays in sight beside its sliders.
    assert 0 <= changed.bounding_box()["y"] < 800
    tab.mouse.up()

    turn = tab.get_by_label("range slider for turn clockwise")
    drag(tab, turn, 0.7)
    expect(says).to_contain_text("Before the drawing was moved: 7, 0.9")
    tab.mouse.up()
    assert tab.get_by_alt_text("turned and shifted").is_visible()
    assert tab.locator("#evidence figure").count() == 3
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") == 0

    tab.get_by_role("button", name="Set all sliders to 0").click()
    expect(says).not_to_contain_text("Before")
    assert {
        float(x) for x in tab.locator("input[type=range]").evaluate_all("a => a.map(x => x.value)")
    } == {0}
    tab.get_by_role("button", name="Clear").first.click()
    expect(says).to_have_text(re.compile("^Draw one digit"))
    expect(rows).to_have_count(0)


@pytest.mark.parametrize("tab", [360], indirect=True)
def test_a_file_is_read_and_another_is_refused(tab, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    picture = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(picture).line([(80, 60), (220, 60), (130, 250)], fill=0, width=22)
    picture.save(good)
    bad.write_text("no image")
    chooser = tab.locator("#file input[type=file]")
    chooser.set_input_files(good)
    says = tab.locator(".says")
    expect(says).to_contain_text("Longest capsule: 7")
    ink = "c => c.getContext('2d').getImageData(0, 0, 280, 280).data.filter(v => v == 255).length"
    assert tab.locator("#drawing canvas").evaluate(ink) > 280 * 280 * 1.1
    tab.get_by_role("button", name="Clear").last.click()
    tab.locator("#file input[type=file]").set_input_files(bad)
    expect(says).to_contain_text("bad.png: the image cannot be read")
    assert str(tmp_path) not in says.inner_text()


def cpu_seconds(process):
    """What the program has computed so far; time on the clock depends on other programs."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_answer_takes_less_than_200_milliseconds_of_computing(chromium, program):
    address, process, _ = program
    with chromium.new_page() as tab:
        tab.goto(address)
        draw_seven(tab)
        tab.mouse.up()
        says = tab.locator(".says")
        expect(says).to_contain_text("Longest capsule: 7")
        tab.wait_for_timeout(400)
        number = tab.get_by_label("range slider for turn clockwise")
        before = cpu_seconds(process)
        for turn in range(1, 6):
            earlier = tab.locator("#bars").inner_html()
            number.fill(str(20 * turn))
            tab.wait_for_function(
                "old => document.querySelector('#bars').innerHTML != old", arg=earlier
            )
        assert (cpu_seconds(process) - before) / 5 < 0.2


def test_ctrl_c_ends_it_with_one_line_and_it_asked_no_other_machine(program):
    """The last test of this file: the program has served the others."""
    _, process, connections = program
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "explore: interrupted\n")
    asked = set(connections.read_text().split()) if connections.exists() else set()
    assert asked <= {"127.0.0.1", "localhost"}
