"""Published capsule networks, one module each."""

from capsjax.models.capsnet import CapsNet as CapsNet
