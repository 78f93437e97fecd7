"""Pallas-Mosaic kernels for TPUs, of the passes with linear logits and sums."""

from capsjax.kernels.vote_passes.mosaic_tpu.kernels import chain as chain
from capsjax.kernels.vote_passes.mosaic_tpu.kernels import (
    chain_and_input_gradients as chain_and_input_gradients,
)
from capsjax.kernels.vote_passes.mosaic_tpu.kernels import config_for as config_for
from capsjax.kernels.vote_passes.mosaic_tpu.kernels import input_gradients as input_gradients
from capsjax.kernels.vote_passes.mosaic_tpu.kernels import moments as moments
