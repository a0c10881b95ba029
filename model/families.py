"""The families of networks that there are: a card's sizes say which one a model is of."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from model.backbone import Backbone, Prepared
from model.prepared import PreparedTransformer
from model.transformer import TransformerConfig, WanTransformer

FAMILIES: Mapping[str, tuple[type, type[Backbone]]] = {"wan": (TransformerConfig, WanTransformer)}
"""Name on a model's card → its sizes and its network."""
PREPARED: Mapping[type, Callable[..., Prepared]] = {WanTransformer: PreparedTransformer}
"""A network's class → what makes it ready for many calls."""


def family_of(sizes: Any) -> str:
    return next(name for name, (kind, _) in FAMILIES.items() if type(sizes) is kind)


def new_backbone(sizes: Any, *, activation_checkpointing: bool = False) -> Backbone:
    """A network of these sizes with its initial weights drawn.

    `activation_checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    """
    network: Any = FAMILIES[family_of(sizes)][1]
    return network(sizes, activation_checkpointing=activation_checkpointing)


def on_meta(sizes: Any) -> Backbone:
    """A network of these sizes that takes no memory."""
    with torch.device("meta"):
        return new_backbone(sizes)


def shapes_of(sizes: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of such a network, by name."""
    return {name: tuple(weight.shape) for name, weight in on_meta(sizes).state_dict().items()}


def prepared(network: Backbone, *, compiled: bool = False, shared: bool = False) -> Prepared:
    """The network as it is now, all of its weights being here, for many calls without gradient.

    `compiled` says whether by TorchInductor; `shared` that the network is never trained, and may have its
    weights where these are.
    """
    return PREPARED[type(network)](network, compiled=compiled, shared=shared)
