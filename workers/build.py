"""The only place that makes networks: a model's card and its role's settings → backbone, adapters, engine."""

import json
from typing import Literal

import torch
from torch import Tensor, nn

from model.adapters import AdaptedWeights, AdapterConfig, adapt, merged, peft_layout
from model.backbone import Backbone
from model.discriminator import BranchConfig, ClassificationBranch, Discriminator
from model.families import new_backbone, on_meta, shapes_of
from workers.engine import EngineConfig, FrozenEngine, TrainEngine, WeightSource
from workers.model_directory import ModelDirectory, ModelWriter, save
from workers.zero import DTYPES


def meta(source: ModelDirectory) -> Backbone:
    """The network of a model without its weights."""
    return on_meta(source.card.transformer)


def check_weights(source: ModelDirectory) -> None:
    """ValueError where a model's weights are not of its card's sizes; no weight is read."""
    source.check_shapes(shapes_of(source.card.transformer))


def check_adapters(source: ModelDirectory, adapters: AdapterConfig) -> None:
    """Invalid, naming the setting, where a model has no layers that the adapters could be of."""
    if adapters.rank:
        adapters.layers(meta(source))


def whole(
    source: ModelDirectory, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Backbone:
    """A model's whole network on one device, frozen, for inference, in its own type unless another is
    named."""
    network, dtype = meta(source), dtype or DTYPES[source.card.dtype]
    state = {name: source.get(name).to(device, dtype) for name in source.keys()}  # noqa: SIM118 (not a mapping)
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def frozen(source: ModelDirectory, *, zero_stage: int, dtype: Literal["fp32", "bf16"]) -> FrozenEngine:
    """One rank of a model that answers, replicated or sharded."""
    # Recomputing happens under a gradient only, which a score has where the objective flows through it.
    return FrozenEngine(
        lambda: new_backbone(source.card.transformer, activation_checkpointing=True),
        weights=source,
        zero_stage=zero_stage,
        dtype=dtype,
    )


def trained(
    source: ModelDirectory,
    engine: EngineConfig,
    *,
    activation_checkpointing: bool,
    adapters: AdapterConfig,
    branch: BranchConfig | None = None,
) -> TrainEngine:
    """One rank of a model in training: all its weights, or adapters; perhaps a classification branch."""
    sizes = source.card.transformer
    weights: WeightSource = source
    if adapters.rank:
        weights = AdaptedWeights(source, adapters, adapters.layers(meta(source)))
    if branch is not None:
        weights = _WithBranch(weights, ClassificationBranch.drawn(sizes, branch))

    def build() -> nn.Module:
        network = adapt(new_backbone(sizes, activation_checkpointing=activation_checkpointing), adapters)
        if branch is None:
            return network
        return Discriminator(network, branch, activation_checkpointing=activation_checkpointing)

    return TrainEngine(build, engine, weights=weights)


def write_weights(
    engine: TrainEngine, writer: ModelWriter, source: ModelDirectory, adapters: AdapterConfig
) -> None:
    """The averaged weights (the current ones where none are kept) into a model's directory; on all ranks.

    With adapters those are the weights that `source` has on disk plus what was learned, and the adapter lies
    beside them in `adapter/`, as PEFT reads it.
    """
    ema = engine.config.ema_decay is not None
    if not adapters.rank:
        engine.export(writer.write, ema=ema)
        return
    learned: dict[str, Tensor] = {}
    engine.export(learned.__setitem__, ema=ema, trained_only=True)
    if not learned:  # every rank but 0
        return
    for name in source.keys():  # noqa: SIM118 (not a mapping)
        writer.write(name, merged(name, source.get(name), learned, adapters))
    tensors, settings = peft_layout(learned, adapters, source.path)
    directory = writer.directory / "adapter"
    directory.mkdir()
    save(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1))


class _WithBranch:
    """Weights of a network, and of a classification branch that has not learned yet."""

    def __init__(self, source: WeightSource, branch: ClassificationBranch):
        self.source = source
        self.branch = branch.state_dict()

    def keys(self) -> list[str]:
        return [f"transformer.{name}" for name in self.source.keys()] + [  # noqa: SIM118 (not a mapping)
            f"branch.{name}" for name in self.branch
        ]

    def get(self, name: str) -> Tensor:
        part, _, own = name.partition(".")
        return self.branch[own] if part == "branch" else self.source.get(own)
