"""Capsule networks in JAX: exact routing by agreement that never stores the votes.

`capsjax.shapes` declares the shape letters of the docstrings.
"""

from capsjax.conv import strided_conv as strided_conv
from capsjax.kernels.dispatch import Unsupported as Unsupported
from capsjax.kernels.squash import squash as squash
from capsjax.losses import margin_loss as margin_loss
from capsjax.losses import reconstruction_loss as reconstruction_loss
from capsjax.metrics import coupling_entropy as coupling_entropy
from capsjax.metrics import lengths as lengths
from capsjax.recommend import count_interests as count_interests
from capsjax.recommend import label_aware_attention as label_aware_attention
from capsjax.recommend import multi_interests as multi_interests
from capsjax.recommend import self_attentive_interests as self_attentive_interests
from capsjax.routing.dynamic import dynamic_routing as dynamic_routing
from capsjax.routing.dynamic import dynamic_routing_from_votes as dynamic_routing_from_votes
from capsjax.routing.dynamic import routing_couplings as routing_couplings
from capsjax.routing.em import em_routing as em_routing
from capsjax.routing.inverted_attention import (
    inverted_attention_routing as inverted_attention_routing,
)
from capsjax.routing.inverted_attention import inverted_attention_step as inverted_attention_step
from capsjax.routing.kmeans import kmeans_routing as kmeans_routing
from capsjax.routing.self_attention import self_attention_routing as self_attention_routing
from capsjax.routing.self_routing import self_routing as self_routing
from capsjax.routing.variational_bayes import (
    variational_bayes_routing as variational_bayes_routing,
)

__version__ = "0.1.0"
