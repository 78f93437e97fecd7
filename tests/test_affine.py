"""Affine transformations, compared with SciPy and Pillow."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from experiments.data.affine import Pose, random_affine, uniform, warp


def by_scipy(image, rotation, shift, scale, shear, *, order):
    """Warp with the documented order of transformations, as homogeneous matrices in float64."""
    height, width = image.shape
    r, lean = np.deg2rad(rotation), np.tan(np.deg2rad(shear))

    def move(x, y):
        return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])

    turn = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    middle = ((width - 1) / 2, (height - 1) / 2)
    forward = (
        move(*shift)
        @ move(*middle)
        @ turn
        @ np.array([[1, -lean, 0], [0, 1, 0], [0, 0, 1]])
        @ np.diag([*scale, 1])
        @ move(-middle[0], -middle[1])
    )
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    return ndimage.affine_transform(
        image.astype(float), swap @ np.linalg.inv(forward) @ swap, order=order, mode="grid-constant"
    )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("shape", [(9, 12), (14, 14)])
def test_warp_equals_scipy(shape, order):
    rng = np.random.default_rng(0)
    images = rng.random((4, *shape, 2), np.float32)
    pose = Pose(
        rotation=np.array([23.0, -151.0, 5.0, 0.0]),
        shift=np.array([[1.3, -2.1], [0.2, 0.4], [-3.0, 1.0], [0.0, 0.0]]),
        scale=np.array([[1.2, 0.7], [0.9, 0.9], [1.0, 1.6], [1.0, 1.0]]),
        shear=np.array([17.0, -8.0, 40.0, 0.0]),
    )
    found = warp(images, pose, order=order)
    assert found.dtype == np.float32
    for n, c in np.ndindex(4, 2):
        expected = by_scipy(images[n, ..., c], *(part[n] for part in pose), order=order)
        differ = np.abs(found[n, ..., c] - expected) > 2e-6
        # Nearest neighbours may differ where rounding breaks ties between two pixels.
        assert differ.mean() <= (0 if order else 0.01)


@pytest.mark.parametrize("size", [20, 21])
def test_rotation_equals_pillow(size):
    image = np.zeros((size, size), np.float32)
    image[6:14, 5:15] = np.random.default_rng(1).random(
        (8, 10)
    )  # a margin, because Pillow treats edges differently
    # Pillow's positive angles are anticlockwise.
    expected = Image.fromarray(image).rotate(-30, resample=Image.Resampling.BILINEAR)
    found = warp(image[None, ..., None], Pose.broadcast(1, rotation=30))
    np.testing.assert_allclose(found[0, ..., 0], np.asarray(expected), atol=1e-4)


def test_rotations_are_clockwise_and_shifts_go_right_and_down():
    image = np.random.default_rng(2).random((1, 6, 6, 1), np.float32)
    turned = warp(image, Pose.broadcast(1, rotation=90))
    np.testing.assert_allclose(turned[0], np.rot90(image[0], -1), atol=1e-5)
    moved = warp(image, Pose.broadcast(1, shift=(2, 1)))
    expected = np.zeros_like(image)
    expected[:, 1:, 2:] = image[:, :-1, :-2]
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(warp(image, Pose.broadcast(1)), image)


def test_positive_shear_slants_to_the_right():
    image = np.zeros((1, 15, 15, 1), np.float32)
    image[:, 2:13, 7] = 1
    columns = warp(image, Pose.broadcast(1, shear=30))[0, ..., 0].argmax(1)
    assert columns[2] == 10
    assert columns[7] == 7
    assert columns[12] == 4


def test_random_poses_are_computed_from_philox_bits():
    pose = random_affine(4, 28, 30, 0.1, key=[3, 1])
    bits = np.random.Philox(key=np.array([3, 1], np.uint64)).random_raw(12).reshape(3, 4)
    angle, right, down = 2 * (bits // 2**11) / 2**53 - 1
    np.testing.assert_array_equal(pose.rotation, 30 * angle)
    np.testing.assert_array_equal(pose.shift, np.rint(2.8 * np.stack([right, down], 1)))
    np.testing.assert_allclose(
        uniform(1, 3, key=[0, 0])[0], [0.01154675, 0.2415492, 0.11142586], atol=1e-8
    )


def test_random_poses_fill_their_ranges_and_depend_on_the_key():
    pose = random_affine(4000, 28, 30, 0.1, key=[0, 0])
    assert -30 <= pose.rotation.min() < -29.8
    assert 29.8 < pose.rotation.max() <= 30
    assert abs(pose.rotation.mean()) < 1
    assert {*pose.shift.ravel()} == set(range(-3, 4))
    assert np.ptp(pose.scale) == np.ptp(pose.shear) == 0
    for key in ([0, 1], [1, 0]):
        assert np.mean(random_affine(4000, 28, 30, 0.1, key=key).rotation == pose.rotation) < 0.01
