"""Dynamic routing by agreement: one function, several implementations.

Each takes `(poses [B, I, P], weights [I, P, J, D], prior [I, J] or None, bias [J, D] or None)`
and the settings `num_iterations`, `gradient` and `axis_name`, and returns `[B, J, D]` in the dtype
of the poses.
"""

from capsjax.kernels.dynamic_routing import (
    config,
    pallas_mosaic_tpu,
    pallas_triton,
    reference,
    xla,
)

IMPLEMENTATIONS = {
    "reference": reference.dynamic_routing,
    "xla": xla.dynamic_routing,
    "pallas_mosaic_tpu": pallas_mosaic_tpu.dynamic_routing,
    "pallas_triton": pallas_triton.dynamic_routing,
}
PREFERENCE = {
    "tpu": ("pallas_mosaic_tpu", "xla"),
    "cuda": ("pallas_triton", "xla"),
    "default": ("xla",),
}
PLATFORMS = {"pallas_mosaic_tpu": "tpu", "pallas_triton": "cuda"}
# How those that take a `config` choose it for a `cases.Case`; None: no config will do.
CONFIGS = {
    "xla": lambda case: config.tile_for(case.batch, case.capsules, case.parents, case.depth),
    "pallas_mosaic_tpu": config.mosaic_tpu_config_for,
    "pallas_triton": config.triton_config_for,
}
