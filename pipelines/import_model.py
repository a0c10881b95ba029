"""`self-forcing import`: a model of another tool's checkpoint.

A checkpoint holds weights. What else makes a model of them (whether it is causal, how it generates, what its
latents and prompts are) a preset says, or `--rollout.*` and its like.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from infra import storage
from infra.settings import at_least, positive
from model import umt5, wan_vae
from model.backbone import WeightSource
from model.rollout_plan import RolloutConfig
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.recipe import PRESETS, recipe_bodies, shipped
from workers.foreign.adapter import ForeignAdapter, Merged
from workers.foreign.checkpoint import ForeignCheckpoint, recognise
from workers.model_directory import (
    ModelCard,
    ModelWriter,
    TextConfig,
    VideoConfig,
    never_trained,
    origin_of,
)

WAN_VIDEO = VideoConfig(frames=21, channels=16, height=60, width=104, codec="none", fps=16)


@dataclass(frozen=True)
class ImportConfig:
    """What a checkpoint does not say of its model."""

    cite: str = ""
    """Where these settings are from."""
    causal: bool | None = None
    """Whether a frame sees earlier ones only: a student, or a teacher of one. Null is what the checkpoint's
    folder says, if it does."""
    heads: int | None = None
    """Attention heads, where no config.json says so and the width is not one of Wan's."""
    text_len: int = 512
    """Text tokens that the model reads, where no config.json says so."""
    video: VideoConfig = WAN_VIDEO
    """Shape of a latent video that the model was trained on."""
    text: TextConfig = TextConfig("embedded")
    """Prompt embedding."""
    rollout: RolloutConfig = RolloutConfig()
    """How a causal model generates."""
    guidance: float = 0.0
    """Classifier-free guidance that a causal model generates with; a distilled one needs none."""
    shift: float = 5.0
    """Warp of the noise schedule that the model was trained with."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What it computes in."""

    def __post_init__(self) -> None:
        at_least(self, 1, "heads", "text_len")
        at_least(self, -1, "guidance")
        positive(self, "shift")


def command(config: ImportConfig, options: Any) -> None:
    """Write a model; ValueError, before anything is written, where the checkpoint is none that runs here."""
    if (Path(options.source) / "model.json").exists():
        raise ValueError(f"{options.source} is a model of this project already; use it as it is.")
    config = _with_its_own(config, Path(options.source))
    checkpoint = ForeignCheckpoint(
        options.source, part=options.part, heads=config.heads, text_len=config.text_len
    )
    weights: WeightSource = checkpoint
    origin = origin_of(checkpoint) | {"preset": options.preset, "cite": config.cite}
    if options.preset is not None and (changed := _untrained(config.rollout, options.preset)):
        origin["untrained"] = changed
    if options.adapter is not None:
        weights = Merged(checkpoint, ForeignAdapter(options.adapter))
        origin["adapter"] = str(Path(options.adapter).absolute())
    card = card_of(config, checkpoint, origin)
    with _published(options.output, card) as writer:
        for name in sorted(weights.keys()):
            writer.write(name, weights.get(name))
    sizes = card.transformer
    say(
        f"import: {options.output} is {'a causal' if card.causal else 'a bidirectional'} model of "
        f"{sizes.parameters() / 1e6:,.4g} million weights (width {sizes.dim}, {sizes.num_layers} layers, "
        f"{sizes.num_heads} heads), from {checkpoint.layout.kind}"
        f"{f', part {checkpoint.part}' if checkpoint.part else ''}."
    )
    for sentence in never_trained(card):
        say(f"import: {sentence}")


def _untrained(rollout: RolloutConfig, preset: str) -> dict[str, Any]:
    """What the cache shows otherwise than when the preset's models were trained: setting → as it was."""
    trained: dict[str, Any] = {}
    for body in recipe_bodies(shipped(preset, PRESETS), ImportConfig, folder=PRESETS):
        trained |= body.get("rollout", {})
    if not trained:  # a bidirectional model's
        return {}
    as_it_was = RolloutConfig(**trained)
    names = ("window", "sink", "positions")
    return {
        name: getattr(as_it_was, name) for name in names if getattr(rollout, name) != getattr(as_it_was, name)
    }


@contextmanager
def _published(path: str, card: ModelCard) -> Iterator[ModelWriter]:
    """A writer of the weights of a model, which is at `path` when the block is left."""
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        writer = ModelWriter(directory)
        yield writer
        writer.finish(card, {})
    storage.publish(staging, path, {"causal": card.causal})


def _with_its_own(config: ImportConfig, source: Path) -> ImportConfig:
    """The settings with the VAE and the text encoder that a folder of the release or of a pipeline has, where
    none are named."""

    def has(*patterns: str) -> bool:
        return any(any(source.glob(pattern)) for pattern in patterns)

    if config.video.codec == "none" and has("vae/config.json", wan_vae.RELEASED):
        config = replace(config, video=replace(config.video, codec="wan_vae", vae=str(source)))
    if config.text.encoder == "embedded" and has("text_encoder/config.json", umt5.RELEASED):
        config = replace(config, text=TextConfig("umt5", str(source)))
    if config.text.path is not None:
        config = replace(config, text=replace(config.text, path=os.path.abspath(config.text.path)))
    return config


def card_of(config: ImportConfig, checkpoint: ForeignCheckpoint, origin: Mapping[str, Any]) -> ModelCard:
    """The card of an imported model; ValueError where the settings do not say or fit what it is."""
    causal = config.causal
    if causal is None:
        causal = True if config.rollout != RolloutConfig() else checkpoint.causal
    if causal is None or (causal and not config.cite and config.rollout == RolloutConfig()):
        names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        unsaid = "whether it is causal" if causal is None else "how it generates"
        raise ValueError(
            f"{checkpoint.path} does not say {unsaid}; name a --preset ({names}), or say so with --causal "
            "and --rollout settings."
        )
    if config.text.encoder == "bytes":
        raise ValueError(
            f"text.encoder is bytes, and {checkpoint.path} brings no such encoder; use umt5, or embedded."
        )
    sizes, channels = checkpoint.sizes, config.video.channels
    if sizes.in_dim != channels:
        raise ValueError(
            f"video.channels is {channels}, and the model at {checkpoint.path} reads {sizes.in_dim}; use "
            "that."
        )
    sizes.grid(config.video.height, config.video.width)
    if causal:
        config.rollout.check_frames(config.video.frames)
    return ModelCard(
        causal,
        sizes,
        config.video,
        config.text,
        rollout=config.rollout if causal else None,
        guidance=config.guidance if causal else 0.0,
        shift=config.rollout.shift if causal else config.shift,
        dtype=config.dtype,
        text_digest="" if config.text.path is None else umt5.digest(config.text.path),
        origin=origin,
    )


def adopt(config: RunConfig) -> RunConfig:
    """The config with a model of its own in place of every folder of another tool that it names.

    Such a model takes no weights: it stands for the folder, in `outputs/imported` below the root, and is made
    when it is first named. Only bidirectional models can be named so: the rest needs settings of its own.

    Raises:
        ValueError: a folder is of a network that does not run here, or is damaged; names the setting.
    """
    for section, names in (("initialize", ("teacher",)), ("distill", ("teacher", "student", "critic"))):
        part = getattr(config, section)
        found = {name: getattr(part, name) for name in names if getattr(part, name) is not None}
        changed = {name: _adopted(path, f"{section}.{name}", config) for name, path in found.items()}
        if changed != found:
            config = replace(config, **{section: replace(part, **changed)})
    return config


def _adopted(path: str, setting: str, config: RunConfig) -> str:
    """The model that stands for what lies at `path`, or `path` where that is a model of ours or nothing."""
    if recognise(path) is None:
        return path
    # Its card says what latents and prompts are, so another recipe's is another.
    what = (path, config.video, config.text, config.student.text_len, config.score.shift)
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
    model = f"{config.root}/outputs/imported/{Path(path).name}-{name}"
    if storage.is_complete(model):
        return model
    try:
        checkpoint = ForeignCheckpoint(path, text_len=config.student.text_len)
        if checkpoint.causal is not False:
            raise ValueError(f"{path} may be a causal model; `import` it, which asks how it generates.")
        own = ImportConfig(causal=False, video=config.video, text=config.text, shift=config.score.shift)
        card = card_of(own, checkpoint, origin_of(checkpoint))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    with _published(model, card) as writer:
        writer.link(checkpoint)
    say(f"{setting}: {path} is read as it is, as {model}.")
    return model
