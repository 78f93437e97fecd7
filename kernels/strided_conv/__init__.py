"""Strided convolution without padding, in several implementations.

Each maps images `[B, H, W, C]` and a kernel `[h, w, C, O]`, with a `stride` (rows, columns), to
`[B, (H - h) // stride + 1, (W - w) // stride + 1, O]`.
"""

from capsjax.kernels.strided_conv import patches, spectral, xla

IMPLEMENTATIONS = {
    "xla": xla.strided_conv,
    "patches": patches.strided_conv,
    "spectral": spectral.strided_conv,
}
PREFERENCE = {"cpu": ("spectral", "patches"), "default": ("xla",)}
