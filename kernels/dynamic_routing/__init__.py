"""Dynamic routing by agreement: one function, several implementations.

Each takes `(poses [B, I, P], weights [I, P, J, D], prior [I, J] or None, bias [J, D] or None)`
and the settings `num_iterations` and `gradient`, and returns `[B, J, D]` in the poses' dtype.
"""

from capsjax.kernels.dynamic_routing import reference, xla
from capsjax.kernels.dynamic_routing.config import tile_for

IMPLEMENTATIONS = {
    "reference": reference.dynamic_routing,
    "xla": xla.dynamic_routing,
}
PREFERENCE = {"default": ("xla",)}
PLATFORMS: dict[str, str] = {}
# How those that take a `config` choose it, from batch, capsules, parents and depth.
CONFIGS = {"xla": tile_for}
