"""Published networks, one file each."""

from capsjax.models.capsnet import CapsNet as CapsNet
