"""The figure of overlapping digits: each in its colour, and what is wrong is framed."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from experiments.figures.style import BLUE, ORANGE
from experiments.train_multimnist import draw_overlaps


@pytest.fixture
def pairs():
    """A digit in the upper half and one in the lower half, and the same drawn by capsules."""
    layers = np.zeros((2, 2, 8, 8, 1))
    layers[:, 0, 1:3] = 1
    layers[:, 1, 5:7] = 1
    return layers


def draw(layers, drawn, predicted):
    return draw_overlaps(
        layers,
        drawn,
        labels=np.array([[3, 5], [4, 2]]),
        predicted=np.array(predicted),
        lengths=np.array([[0.9, 0.8], [0.7, 0.6]]),
    )


def test_a_reconstruction_has_the_colour_of_the_digit_it_names(pairs):
    """The first example names its second digit first."""
    figure = draw(pairs, pairs[:, ::-1], [[5, 3], [2, 4]])
    [axes] = figure.axes
    [image] = axes.images
    mosaic = np.asarray(image.get_array())
    height, width = mosaic.shape[0] // 2, mosaic.shape[1] // 2
    for top in (0, height):
        for left in (0, width):
            np.testing.assert_allclose(mosaic[top + 3, left + 4], to_rgb(ORANGE), atol=0.01)
            np.testing.assert_allclose(mosaic[top + 7, left + 4], to_rgb(BLUE), atol=0.01)
    assert not [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    captions = [label.get_text() for label in axes.get_xticklabels()]
    assert captions == ["3 + 5\n5  0.90\n3  0.80", "4 + 2\n2  0.70\n4  0.60"]


def test_a_wrong_class_is_grey_and_its_column_framed(pairs):
    figure = draw(pairs, pairs, [[3, 5], [4, 9]])
    [axes] = figure.axes
    mosaic = np.asarray(axes.images[0].get_array())
    height, width = mosaic.shape[0] // 2, mosaic.shape[1] // 2
    red, green, blue = mosaic[height + 7, width + 4]
    assert red == green == blue > 0.5
    [frame] = axes.patches
    assert frame.get_x() == 0.5
    assert axes.get_title("left") == "Framed: wrong predictions"
