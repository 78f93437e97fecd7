"""Routing problem sizes that tests, benchmarks and reports share."""

from typing import NamedTuple


class Case(NamedTuple):
    """Sizes and dtype of a routing problem."""

    batch: int  # B
    capsules: int  # I
    length: int  # P
    parents: int  # J
    depth: int  # D
    num_iterations: int = 3  # T
    dtype: str = "float32"  # of poses and weights
    rows: int = 1  # R; of a matrix pose, `length` is the number of columns, and D = R·E


CASES = {
    # Sabour, Frosst and Hinton 2017: 6 x 6 positions of 32 types.
    "capsnet_mnist": Case(batch=128, capsules=1152, length=8, parents=10, depth=16),
    # The same network on 36 x 36 images (MultiMNIST): 10 x 10 positions.
    "capsnet_multimnist": Case(batch=128, capsules=3200, length=8, parents=10, depth=16),
    # On 40 x 40 images (affNIST): 12 x 12 positions.
    "capsnet_affnist": Case(batch=128, capsules=4608, length=8, parents=10, depth=16),
    # On 32 x 32 images in colour (CIFAR-10, SVHN): 8 x 8 positions.
    "capsnet_colour": Case(batch=128, capsules=2048, length=8, parents=10, depth=16),
    # Many parents; a copy of the votes takes 6.2 GB.
    "many_parents": Case(batch=128, capsules=3872, length=8, parents=196, depth=16),
    # Convolutional capsules: 3 x 3 windows of 32 types with 4 x 4 poses, at 6 x 6 positions of
    # 128 images. Children compete within a window only, so each window is an example.
    "conv_capsules": Case(batch=4608, capsules=288, length=16, parents=32, depth=16),
    # A copy of the votes takes 4.3 GB in bfloat16; implementations that store votes, which need
    # several copies, run out of memory.
    "long": Case(32, 65536, length=16, parents=64, depth=16, dtype="bfloat16"),
}

# Cases of other routings than `dynamic_routing`: the name of the function, and the sizes.
FAMILY: dict[str, tuple[str, Case]] = {
    # Hinton, Sabour and Frosst 2018: 4 x 4 poses. Class capsules at 6 x 6 positions of 32 types,
    "matrix_capsules_classes": ("em_routing", Case(128, 1152, 4, 10, 16, rows=4)),
    # and 3 x 3 windows of 32 types at 6 x 6 positions of 128 images, a window an example.
    "matrix_capsules_windows": ("em_routing", Case(4608, 288, 4, 32, 16, rows=4)),
    # Mazzia, Salvetti and Chiaberge 2021 on MNIST: two passes, whatever the number of iterations.
    "efficient_capsnet_mnist": ("self_attention_routing", Case(128, 16, 8, 10, 16)),
    # Tsai et al. 2020 on CIFAR-10: class capsules at 5 x 5 positions of 32 types,
    "inverted_attention_classes": (
        "inverted_attention_routing",
        Case(128, 800, 4, 10, 16, num_iterations=2, rows=4),
    ),
    # and 3 x 3 windows of 32 types at 7 x 7 positions of 128 images.
    "inverted_attention_windows": (
        "inverted_attention_routing",
        Case(6272, 288, 4, 32, 16, num_iterations=2, rows=4),
    ),
}
