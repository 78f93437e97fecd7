"""Precision of the kernels' matrix products.

The kernels multiply float32 operands as sums of bfloat16 numbers, their parts, and accumulate in
float32. Two parts have 16 significant bits and three have 24, as float32. Products of low parts
with low parts are left out. bfloat16 operands have one part, so their products are exact.

`jax.default_matmul_precision` selects the number of parts of float32 operands:

    setting                                                         GPU   TPU
    None, "default"                                                 2     1
    "bfloat16", "BF16_BF16_F32"                                     1     1
    "high", "tensorfloat32", "BF16_BF16_F32_X3", "TF32_TF32_F32"    2     2
    "highest", "float32", "F32_F32_F32", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9",
    "TF32_TF32_F32_X3"                                              3     3

The defaults are of the error that JAX's own products have on the platform, or less: TensorFloat-32
on a GPU has 11 significant bits, and one part on a TPU has 8. Any other setting is not supported.
"""

import jax

from capsjax.kernels.dispatch import Unsupported

_DEFAULTS = {"cuda": 2, "tpu": 1}
_PARTS = {
    **dict.fromkeys(("bfloat16", "BF16_BF16_F32"), 1),
    **dict.fromkeys(("high", "tensorfloat32", "BF16_BF16_F32_X3", "TF32_TF32_F32"), 2),
    **dict.fromkeys(("highest", "float32", "F32_F32_F32"), 3),
    **dict.fromkeys(("BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3"), 3),
}


def parts(platform: str) -> int:
    """Return the number of bfloat16 parts of float32 operands on "cuda" or "tpu".

    Raises:
      Unsupported: No number of parts has the precision of `jax.default_matmul_precision`.
    """
    setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if setting in (None, "default"):
        return _DEFAULTS[platform]
    if setting not in _PARTS:
        raise Unsupported(
            f"routing: jax.default_matmul_precision of the kernels must be one of "
            f"{', '.join(_PARTS)}, got {setting!r}"
        )
    return _PARTS[setting]
