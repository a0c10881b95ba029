"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the linear layers of any network.

A layer answers W x + b + (alpha / rank) · B A x, where only A and B learn. Both are parameters of the layer
itself, so that the base keeps its names, and ZeRO-3 gathers a layer's weights and its adapter at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.settings import Invalid, at_least
from model.backbone import WeightSource
from model.noise import generator


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters in place of training all weights."""

    rank: int = 0
    """Rank of an adapter; 0 trains all weights instead."""
    alpha: float | None = None
    """Numerator of the scale alpha / rank; none is the rank, a scale of 1."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Linear layers that are adapted: those whose dotted name is, or ends with, one of these."""

    def __post_init__(self) -> None:
        at_least(self, 0, "rank")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise Invalid("alpha", f"is {self.alpha}; it must be a positive number, or null for the rank.")
        if self.rank and not self.targets:
            raise Invalid("targets", "is empty; name at least one linear layer, such as q.")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def layers(self, network: nn.Module) -> dict[str, nn.Linear]:
        """The layers of `network` that are adapted, by name; Invalid where a target names none."""
        found: dict[str, nn.Linear] = {}
        linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        for target in self.targets:
            matched = {name: layer for name, layer in linear.items() if f".{name}".endswith(f".{target}")}
            if not matched:
                names = ", ".join(
                    sorted({name.rpartition("blocks.")[2].partition(".")[2] or name for name in linear})
                )
                raise Invalid(
                    "targets", f"names {target!r}, and no linear layer is called so; there are {names}."
                )
            found |= matched
        smallest = min(min(layer.in_features, layer.out_features) for layer in found.values())
        if self.rank > smallest:
            raise Invalid(
                "rank", f"{self.rank} is above {smallest}, the width of the narrowest layer; use less."
            )
        return found


class AdaptedLinear(nn.Linear):
    """A linear layer and its adapter."""

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        """`base` gives its own weight and bias, which stop learning."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, config.scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.zeros(config.rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank))

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(self.weight.dtype)  # the timestep's is fp32
        low = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + self.scale * low

    def whole_weight(self) -> Tensor:
        """The weight with the adapter's product added, without a gradient."""
        return self.weight.detach() + self.scale * (self.lora_B.detach() @ self.lora_A.detach())


def adapt(network: Any, config: AdapterConfig) -> Any:
    """Freeze `network` and adapt each layer that `config` names, in place; without a rank, nothing."""
    if config.rank:
        network.requires_grad_(False)
        for name, layer in config.layers(network).items():
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, AdaptedLinear(layer, config))
    return network


def effective(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A network's weights by the names of one without adapters, whose products are added."""
    for name, weight in network.named_parameters():
        parent, _, own = name.rpartition(".")
        if own in ("lora_A", "lora_B"):
            continue
        layer = network.get_submodule(parent)
        if own == "weight" and isinstance(layer, AdaptedLinear):
            yield name, layer.whole_weight()
        else:
            yield name, weight.detach()


class AdaptedWeights:
    """A base and adapters that have not learned yet: A uniform (as in the paper's code and PEFT), B zero."""

    def __init__(self, base: WeightSource, config: AdapterConfig, layers: Mapping[str, nn.Linear]):
        self.base = base
        self.shapes: dict[str, tuple[int, int]] = {}
        for name, layer in layers.items():
            self.shapes[f"{name}.lora_A"] = (config.rank, layer.in_features)
            self.shapes[f"{name}.lora_B"] = (layer.out_features, config.rank)

    def keys(self) -> list[str]:
        return [*self.base.keys(), *self.shapes]

    def get(self, name: str) -> Tensor:
        if name not in self.shapes:
            return self.base.get(name)
        if name.endswith("lora_B"):
            return torch.zeros(self.shapes[name])
        rank, width = self.shapes[name]
        # Drawn by name, so that it is the same on any number of ranks and at any ZeRO stage.
        uniform = torch.rand(rank, width, generator=generator("adapter", name))
        return (2 * uniform - 1) / width**0.5


def merged(name: str, base: Tensor, adapters: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The weight `name` with its adapter, if it has one, added in float32."""
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_A" not in adapters:
        return base
    low = adapters[f"{layer}.lora_B"].float() @ adapters[f"{layer}.lora_A"].float()
    return base.float() + config.scale * low


def peft_layout(
    adapters: Mapping[str, Tensor], config: AdapterConfig, base: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `adapter_config.json` of an adapter as PEFT stores them; `base` says what it
    adapts."""
    tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in adapters.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return tensors, settings
