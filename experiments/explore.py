"""Draw a digit in the browser, and see what the capsules of a trained network make of it.

The page is served to this machine only, and asks nothing of any other.
"""

import contextlib
import dataclasses
import functools
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import gradio
import jax
import numpy as np
from absl import logging

from experiments import cli
from experiments.analysis import evidence, inspection, selection
from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.explore_page import views
from experiments.training import trained

# Shape letters: D dimensions of a class capsule; H, W, C height, width and channels of an image.
HOST = "127.0.0.1"
MAX_SLIDERS = 64
MAX_FILE = "64mb"
CACHE_SECONDS = 600  # after which uploaded files are deleted; all are when the program ends
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # of the reader's system
INTRODUCTION = """# What do the capsules see?

Each class has a capsule, a vector. Its length says how sure the network is that the class is there;
its direction says how it looks: slanted, wide, thick. Draw, then turn the drawing, or move one
dimension of the longest capsule, and watch."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The network and the address of the page."""

    workdir: str = flag(
        "",
        "Folder of a train_mnist run, or a safetensors file, with a CapsNet; it is only read. "
        "Empty: experiments/weights/small.safetensors.",
    )
    data_dir: str = flag(
        "", "Folder of the run's data, for the names of its classes; empty: their numbers."
    )
    port: int = flag(7860, "Port of the page; 0: any that is free.", minimum=0, maximum=65535)


class Explorer:
    """A trained network, and the functions that the page calls; it holds no state of a page.

    Args:
      run: The network.
      workdir: Where it came from, for messages.

    Raises:
      InputError: The network has no capsules, or takes stereo pairs.
    """

    def __init__(self, run: trained.Trained, workdir: str):
        model = selection.capsnet_of(run, workdir)
        self.shape: Any = run.dataset.test.images.shape[1:]
        if self.shape[-1] == 2:
            raise InputError(
                f"workdir {workdir} takes stereo pairs, images of 2 channels, which cannot be drawn"
            )
        self.side = run.config.side
        self.num_classes, self.depth = model.capsules.weights.shape[2:]
        self.names = run.dataset.class_names or [str(k) for k in range(self.num_classes)]
        self.has_decoder = bool(run.config.reconstruction_weight)
        height, width, channels = self.shape
        self.seen = (self.side or height, self.side or width, channels)
        self.fields = evidence.receptive_fields(model, self.seen)
        # Parameters are an argument, because XLA would constant-fold closed-over arrays.
        look = jax.jit(
            lambda params, images, added: views.look(
                run.trainer.model(params),
                run.trainer.objective.inputs(images),
                added,
                has_decoder=self.has_decoder,
            )
        )
        self.compute = functools.partial(look, run.params)

    def view(
        self, image: np.ndarray, turn: float, right: float, down: float, *added: float
    ) -> views.View:
        """Return the `View` of an image of the data set's shape."""
        if self.side:
            image = datasets.centred(image[None], self.side)[0]
        values = np.zeros(self.depth, np.float32)
        values[: len(added)] = added
        return views.view(
            self.compute, self.fields, image, turn=turn, right=right, down=down, added=values
        )

    def answer(self, drawing: Any, *sliders: float) -> views.Sections:
        """Return the page's changing parts for a drawing and the sliders' values."""
        try:
            image = views.read_canvas(drawing, self.shape)
        except InputError as error:
            says = views.message(str(error), is_error=True)
            return views.empty(has_decoder=self.has_decoder)._replace(says=says)
        if image is None:
            return views.empty(has_decoder=self.has_decoder)
        shown = self.view(image, *sliders)
        doubt = drawing.get("doubt") or ""
        return views.sections(shown, self.fields, names=self.names, doubt=str(doubt))

    def take_file(self, path: str | None, *sliders: float) -> tuple[Any, ...]:
        """Return a new drawing from an image file, and the page's changing parts for it."""
        if path is None:  # the file was removed from its box; the drawing stays
            return (gradio.skip(),) * (1 + len(views.Sections._fields))
        try:
            drawing = views.read_file(path, self.shape)
        except InputError as error:
            says = views.message(str(error), is_error=True)
            return gradio.skip(), says, *(gradio.skip(),) * (len(views.Sections._fields) - 1)
        return drawing, *self.answer(drawing, *sliders)

    def reset(self, drawing: Any, *sliders: float) -> tuple[Any, ...]:
        """Return sliders at 0, and the page's changing parts for them."""
        zeros = (0,) * len(sliders)
        return *zeros, *self.answer(drawing, *zeros)


def build_page(explorer: Explorer) -> gradio.Blocks:
    """Lay out the page, and connect drawing and sliders with the explorer's answers."""
    folder = pathlib.Path(views.__file__).parent
    height, width, _ = explorer.seen
    low, high = min(inspection.TWEAKS), max(inspection.TWEAKS)
    count = min(explorer.depth, MAX_SLIDERS) if explorer.has_decoder else 0
    part = functools.partial(gradio.HTML, apply_default_css=False)
    slider = functools.partial(gradio.Slider, buttons=[])
    first = views.empty(has_decoder=explorer.has_decoder)
    with gradio.Blocks(
        title="capsjax: explore",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
    ) as page:
        gradio.Markdown(INTRODUCTION)
        says = part(first.says)
        with gradio.Row():
            with gradio.Column(min_width=280):
                gradio.Markdown("### Draw a digit, or drop one")
                drawing = part(
                    html_template=(folder / "canvas.html").read_text(),
                    js_on_load=(folder / "canvas.js").read_text(),
                    elem_id="drawing",
                )
                file = gradio.File(label="image file", show_label=False, height=120, elem_id="file")
            with gradio.Column(min_width=280):
                gradio.Markdown("### Lengths of the class capsules")
                bars = part(elem_id="bars")
            with gradio.Column(min_width=280):
                gradio.Markdown("### Turn and shift the drawing")
                sliders = [
                    slider(-180, 180, 0, step=1, label="turn clockwise, degrees"),
                    slider(-width // 4, width // 4, 0, step=1, label="shift right, pixels"),
                    slider(-height // 4, height // 4, 0, step=1, label="shift down, pixels"),
                ]
                pictures = part(elem_id="pictures")
        if count:
            of = f"{count} of the {explorer.depth}" if count < explorer.depth else f"the {count}"
            gradio.Markdown(f"### Move {of} dimensions of the longest capsule")
        with gradio.Row(visible=bool(count)):
            with gradio.Column(scale=1, min_width=280):
                tweaked = part(elem_id="tweaked")
            with gradio.Column(scale=2, min_width=280, elem_id="dimensions"), gradio.Row():
                sliders += [
                    slider(low, high, 0, step=0.01, label=f"dimension {d}", min_width=130)
                    for d in range(1, count + 1)
                ]
        reset = gradio.Button("Set all sliders to 0")
        gradio.Markdown("### Where the evidence comes from")
        maps = part(elem_id="evidence")
        outputs = [says, bars, pictures, tweaked, maps]
        quick: Any = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        gradio.on(
            [drawing.input, *(slider.input for slider in sliders)],
            explorer.answer,
            [drawing, *sliders],
            outputs,
            trigger_mode="always_last",  # while one answer is computed, only the newest waits
            **quick,
        )
        file.upload(explorer.take_file, [file, *sliders], [drawing, *outputs], **quick)
        reset.click(explorer.reset, [drawing, *sliders], [*sliders, *outputs], **quick)
    return page


@contextlib.contextmanager
def serve(explorer: Explorer, port: int) -> Iterator[str]:
    """Serve the page to this machine while the body runs, and yield its address.

    Raises:
      InputError: The port is in use, or not allowed.
    """
    try:
        with socket.create_server((HOST, port)) as free:
            port = free.getsockname()[1]
    except OSError as error:
        raise InputError(f"--port={port} cannot be used: {error.strerror}") from error
    page = build_page(explorer)
    font, font_mono = FONTS
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=MAX_FILE,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gradio.themes.Base(font=font, font_mono=font_mono),
        css_paths=pathlib.Path(views.__file__).parent / "page.css",
    )
    try:
        yield address
    finally:
        page.close(verbose=False)


def main(config: Config) -> int:
    """Serve the page until Ctrl-C."""
    workdir = config.workdir or str(trained.WEIGHTS)
    run = trained.load(workdir, data_dir=config.data_dir, with_data=bool(config.data_dir))
    explorer = Explorer(run, workdir)
    explorer.view(np.zeros(explorer.shape, np.float32), 1, 0, 0)  # compiles
    with serve(explorer, config.port) as address:
        logging.info("%s: open %s in a browser; Ctrl-C ends", workdir, address)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
