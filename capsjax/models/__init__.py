"""Published capsule networks, one module each, and their files."""

from capsjax.models.capsnet import CapsNet as CapsNet
from capsjax.models.efficient_capsnet import EfficientCapsNet as EfficientCapsNet
from capsjax.models.inverted_attention_capsnet import (
    InvertedAttentionCapsNet as InvertedAttentionCapsNet,
)
from capsjax.models.matrix_capsnet import MatrixCapsNet as MatrixCapsNet
from capsjax.models.saved import load as load
from capsjax.models.saved import save as save
from capsjax.models.sr_capsnet import SRCapsNet as SRCapsNet
