"""The program of docs/recipes/segmentation.md, run as it stands there, does what its page says.

Its steps, unlike those of the other recipes, take longer than their compilation.
"""

import documents
import numpy as np


def test_segmentation(capsys):
    page = documents.run("recipes/segmentation.md")
    assert page["losses"][-1] < 0.1 * page["losses"][0]
    background, disc, cross = page["iou"]
    assert background > 0.95
    assert min(disc, cross) > 0.6
    assert "IoU" in capsys.readouterr().out
    images, labels = page["shapes"](np.random.default_rng(1), 2)
    assert images.shape == (2, 16, 16, 1)
    assert labels.shape == (2, 16, 16)
