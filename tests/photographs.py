"""Photographs of digits on paper, made from a data set with a seed.

Each kind has one difficulty; all have noise, blur, a small turn, JPEG compression, and pens and
resolutions of several sizes.

    PYTHONPATH=. python tests/photographs.py runs/quickstart 3000 200

prints the fraction that a run of train_mnist reads right: 200 of each kind, from seed 3000.
"""

import io
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("clean", "shadow", "speck", "table", "ruled", "squared", "transparent")


def make(digit, kind, seed):
    """Return the bytes of a picture file of one digit, uint8 `[28, 28]` with light ink."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    side = int(rng.integers(300, 1501))
    width, height = side, int(side * rng.uniform(0.7, 1.0))
    box = int(min(width, height) * rng.uniform(0.35, 0.75))
    big = Image.fromarray(digit).resize((box, box), Image.Resampling.BICUBIC)
    big = big.filter(ImageFilter.GaussianBlur(box / 70))
    pen = rng.uniform(70, 170)  # the level of the edge: a lower one is a wider pen
    stroke = np.clip((np.asarray(big, float) - pen) / 25 + 0.5, 0, 1)
    turned = Image.fromarray(np.uint8(255 * stroke)).rotate(
        rng.uniform(-6, 6), Image.Resampling.BILINEAR
    )
    ink = Image.new("L", (width, height))
    free = np.array([width - box, height - box])
    ink.paste(turned, tuple(int(x) for x in free * rng.uniform(0.3, 0.7, 2)))
    if kind == "transparent":
        colour = (255, 255, 255) if rng.random() < 0.7 else (20, 20, 90)
        image = Image.new("RGBA", (width, height), (*colour, 0))
        image.putalpha(ink)
        return _encoded(image, "PNG")
    ink = np.asarray(ink, float) / 255
    paper = np.full((height, width), rng.uniform(190, 250))
    if kind in ("ruled", "squared"):
        paper *= 1 - rng.uniform(0.2, 0.6) * _lines(rng, width, height, kind)
    pixels = paper * (1 - ink * rng.uniform(0.6, 0.9))
    rows, columns = np.indices(pixels.shape) / np.array([height, width])[:, None, None]
    if kind == "speck":
        for _ in range(rng.integers(1, 4)):
            radius = rng.uniform(0.006, 0.02)
            y, x = rng.uniform(0.05, 0.95, 2)
            near = np.hypot((rows - y) * height, (columns - x) * width) < radius * width
            clear = ink[
                max(0, int((y - 0.08) * height)) : int((y + 0.08) * height) + 1,
                max(0, int((x - 0.08) * width)) : int((x + 0.08) * width) + 1,
            ]
            if not clear.any():
                pixels[near] = rng.uniform(10, 80)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (columns - 0.5) + np.sin(angle) * (rows - 0.5)
    if kind == "shadow":
        edge = rng.uniform(0.15, 1.5)
        share = 1 / (1 + np.exp(-(along - rng.uniform(-0.2, 0.2)) / (edge * 0.3)))
        pixels *= 1 - rng.uniform(0.4, 0.75) * share
    else:
        pixels *= 1 - rng.uniform(0, 0.1) * (along + 0.5)
    if kind == "table":
        pixels = _on_table(rng, pixels)
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))
    image = image.filter(ImageFilter.GaussianBlur(side * rng.uniform(0, 0.0015)))
    noisy = np.asarray(image, float) + rng.normal(0, rng.uniform(1, 7), (image.height, image.width))
    return _encoded(
        Image.fromarray(np.uint8(np.clip(noisy, 0, 255))), "JPEG", quality=int(rng.integers(50, 95))
    )


def _lines(rng, width, height, kind):
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    step = max(width, height) * (rng.uniform(0.05, 0.16))
    thick = max(1, round(max(width, height) * rng.uniform(0.001, 0.005)))
    slope = np.tan(np.radians(rng.uniform(-3, 3)))
    for k in range(-10, 50):
        at = (k + rng.uniform(0, 0.02)) * step
        draw.line([(0, at), (width, at + slope * width)], 255, thick)
        if kind == "squared":
            draw.line([(at, 0), (at - slope * height, height)], 255, thick)
    return np.asarray(mask, float) / 255


def _on_table(rng, sheet):
    """Place a sheet, seen a little from the side, on a darker table."""
    height, width = sheet.shape
    level, grain = rng.uniform(20, 120), rng.normal(0, 6, (height // 4 + 1, width))
    table = level + np.repeat(grain, 4, 0)[:height]
    inset = rng.uniform(0.03, 0.13, (4, 2)) * [width, height]
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    corners = np.array([[0, 0], [0, height], [width, height], [width, 0]]) + signs * inset
    source = np.array([[0, 0], [0, height], [width, height], [width, 0]], float)
    rows = []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    coefficients = np.linalg.solve(np.array(rows), source.ravel())
    image = Image.fromarray(sheet.astype(np.float32)).transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        list(coefficients),
        Image.Resampling.BILINEAR,
        fillcolor=-1,
    )
    seen = np.asarray(image)
    return np.where(seen < 0, table, seen)


def _encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def main(workdir, first, count):
    """Print how many photographs of test digits a network reads right."""
    # Here, because tests that make photographs need no programs.
    from experiments.training import trained

    run = trained.load(workdir)
    images, labels = run.test.images, run.test.labels
    for kind in KINDS:
        chosen = np.arange(first, first + count) % len(labels)
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{seed}" for seed in range(count)]
            for seed, (path, index) in enumerate(zip(paths, chosen, strict=True), first):
                pathlib.Path(path).write_bytes(make(images[index, ..., 0], kind, seed))
            found = run.trainer.scores(run.params, trained.read_images(run, paths)).argmax(1)
        right = np.mean(found == labels[chosen])
        print(f"{kind:12}{100 * right:.1f} %", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
