"""A strided convolution: one function, several implementations.

Each takes `(images [B, H, W, C], kernel [h, w, C, O])` and the setting `stride` (rows, columns),
pads nothing, and returns `[B, (H - h) // stride + 1, (W - w) // stride + 1, O]`.
"""

from capsjax.kernels.strided_conv import patches, spectral, xla

IMPLEMENTATIONS = {
    "xla": xla.strided_conv,
    "patches": patches.strided_conv,
    "spectral": spectral.strided_conv,
}
PREFERENCE = {"cpu": ("spectral", "patches"), "default": ("xla",)}
