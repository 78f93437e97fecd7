"""Capsule layers as Flax NNX modules, which hold parameters and call functions of `capsjax`."""

from capsjax.nn.capsules import Capsules as Capsules
from capsjax.nn.capsules import ClassCapsules as ClassCapsules
from capsjax.nn.capsules import ConvCapsules as ConvCapsules
from capsjax.nn.initializers import capsules_init as capsules_init
from capsjax.nn.initializers import votes_init as votes_init
from capsjax.nn.layers import Convolution as Convolution
from capsjax.nn.layers import Decoder as Decoder
from capsjax.nn.layers import PrimaryCapsules as PrimaryCapsules
from capsjax.nn.layers import PrimaryMatrixCapsules as PrimaryMatrixCapsules
from capsjax.nn.routings import DynamicRouting as DynamicRouting
from capsjax.nn.routings import EMRouting as EMRouting
from capsjax.nn.routings import InvertedAttentionRouting as InvertedAttentionRouting
from capsjax.nn.routings import KMeansRouting as KMeansRouting
from capsjax.nn.routings import SelfAttentionRouting as SelfAttentionRouting
from capsjax.nn.routings import SelfRouting as SelfRouting
from capsjax.nn.routings import VariationalBayesRouting as VariationalBayesRouting
