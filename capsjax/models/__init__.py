"""Published capsule networks, one module each."""

from capsjax.models.capsnet import CapsNet as CapsNet
from capsjax.models.efficient_capsnet import EfficientCapsNet as EfficientCapsNet
