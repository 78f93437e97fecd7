"""The routing problems that tests, benchmarks and reports share, named after their model."""

from typing import NamedTuple


class Case(NamedTuple):
    """Sizes in the letters B, I, P, J, D and T of `capsjax.shapes`."""

    batch: int
    capsules: int
    length: int
    parents: int
    depth: int
    num_iterations: int = 3
    dtype: str = "float32"


CASES = {
    # Sabour, Frosst and Hinton 2017: 6 x 6 positions of 32 types.
    "capsnet_mnist": Case(batch=128, capsules=1152, length=8, parents=10, depth=16),
    # The same network on 36 x 36 images (MultiMNIST): 10 x 10 positions.
    "capsnet_multimnist": Case(batch=128, capsules=3200, length=8, parents=10, depth=16),
    # On 40 x 40 images (affNIST): 12 x 12 positions.
    "capsnet_affnist": Case(batch=128, capsules=4608, length=8, parents=10, depth=16),
    # On 32 x 32 images in colour (CIFAR-10, SVHN): 8 x 8 positions.
    "capsnet_colour": Case(batch=128, capsules=2048, length=8, parents=10, depth=16),
    # As many parents as positions: with stored votes 6.2 GB a copy.
    "many_parents": Case(batch=128, capsules=3872, length=8, parents=196, depth=16),
    # Convolutional capsules: 3 x 3 patches of 32 types with 4 x 4 poses, at 6 x 6 positions of
    # 128 images; children compete over types only, so a patch is a row.
    "conv_capsules": Case(batch=4608, capsules=288, length=16, parents=32, depth=16),
    # Where every program that stores votes fails: 4.3 GB a copy in bfloat16, several copies.
    "long": Case(32, 65536, length=16, parents=64, depth=16, dtype="bfloat16"),
}
