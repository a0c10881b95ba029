"""A model on disk: its weights as safetensors, and everything needed to run them.

`model.json` holds sizes, the shape of a video, how the student generates, and where the model came from;
`transformer-*.safetensors` the weights under their Wan names, in shards, or `weights.json` where another
tool's lie; `text_encoder.safetensors` the encoder, if it belongs to the model. The directory is published by
`infra.storage`: whole or not there.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra import storage
from infra.settings import Invalid, Places, at_least, positive
from model import umt5
from model.codec import Codec, SpaceToDepth
from model.families import FAMILIES, family_of
from model.light_vae import LightDecoder
from model.rollout_plan import RolloutConfig
from model.text import ByteEncoder, TextEncoder
from model.transformer import TransformerConfig
from model.wan_vae import WanVae, copy_vae
from workers.foreign.checkpoint import ForeignCheckpoint, check_names
from workers.foreign.files import Safetensors

FORMAT = 1
SHARD_BYTES = 4 * 2**30
LINK = "weights.json"
VAE = "vae"


@dataclass(frozen=True)
class VideoConfig(Places):
    """Shape of a latent video."""

    INPUTS = ("vae",)

    frames: int = 9
    """Latent frames that the models are trained on."""
    channels: int = 4
    """Latent channels."""
    height: int = 8
    """Latent rows."""
    width: int = 8
    """Latent columns."""
    codec: Literal["space_to_depth", "wan_vae", "none"] = "space_to_depth"
    """Latents to frames: blocks of pixels as channels, Wan's VAE, or none, where videos stay latents."""
    vae: str | None = None
    """Folder of the VAE in diffusers' layout, for wan_vae. Models bring a copy of it."""
    pixel_mean: float = 0.0
    """Mean of the data's pixels in [−1, 1], for space_to_depth."""
    pixel_std: float = 1.0
    """Standard deviation of the data's pixels, for space_to_depth."""
    fps: int = 8
    """Frames a second of written videos."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "frames", "channels", "height", "width", "pixel_std", "fps")
        at_least(self, -1, "pixel_mean")
        if (self.vae is None) == (self.codec == "wan_vae"):
            raise Invalid("vae", "must name the VAE's folder where codec is wan_vae, and only there.")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W)."""
        return self.frames, self.channels, self.height, self.width

    @property
    def column(self) -> str:
        """The data sets' column of videos. A VAE is slow, so what it makes is stored."""
        return "video" if self.codec == "space_to_depth" else "latent"

    def check(self) -> None:
        """Invalid where the codec's files are not there, or make other latents."""
        codec = self.make_codec()
        if not isinstance(codec, WanVae):
            return
        try:
            channels = codec.channels
        except ValueError as error:
            raise Invalid("vae", f"cannot be used: {error}") from None
        if channels != self.channels:
            raise Invalid("vae", f"makes latents of {channels} channels, and channels is {self.channels}.")

    def codec_digest(self) -> str | None:
        """What tells the VAE from another one; None where there is none."""
        codec = self.make_codec()
        return codec.digest() if isinstance(codec, WanVae) else None

    def make_codec(self) -> Codec | None:
        if self.codec == "none":
            return None
        if self.codec == "wan_vae":
            assert self.vae is not None, "which is checked"
            return WanVae(self.vae)
        factor = int(self.channels**0.5)
        if factor**2 != self.channels:
            raise Invalid("codec", f"space_to_depth needs a square number of channels, not {self.channels}.")
        return SpaceToDepth(factor, self.pixel_mean, self.pixel_std)

    def shown_by(self, light_decoder: str | None) -> Codec | None:
        """The codec that makes frames for people; ValueError where the light decoder does not fit."""
        codec = self.make_codec()
        if light_decoder is None or codec is None:
            return codec
        light = LightDecoder(codec, light_decoder)
        if light.channels != self.channels:
            raise ValueError(
                f"the light decoder at {light_decoder} reads latents of {light.channels} channels, and the "
                f"model's have {self.channels}."
            )
        return light


@dataclass(frozen=True)
class TextConfig(Places):
    """Prompt embedding."""

    INPUTS = ("path",)

    encoder: Literal["bytes", "umt5", "embedded"] = "bytes"
    """A small byte encoder that is part of the model; UMT5, which embeds the data sets beforehand and new
    prompts when a student generates; or embeddings that come with the data sets, and no encoder."""
    path: str | None = None
    """Folder of UMT5 and its tokenizer, for umt5. Training does not read it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.encoder == "umt5"):
            raise Invalid("path", "must name the encoder's folder where encoder is umt5, and only there.")

    @property
    def column(self) -> str:
        """The data sets' column of prompts: text, or tensors [≤ text_len, text_dim]."""
        return "prompt" if self.encoder == "bytes" else "embedding"


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` says."""

    causal: bool
    """Whether a frame sees earlier ones only: a student, or a teacher of one; a bidirectional one is not."""
    transformer: TransformerConfig
    video: VideoConfig
    text: TextConfig
    rollout: RolloutConfig | None = None  # how a student generates; none for a teacher
    guidance: float = 0.0
    """Classifier-free guidance that a student generates with, in the form cond + guidance · (cond − uncond);
    a distilled one needs none."""
    shift: float = 5.0  # warp of the noise schedule that the model was trained with
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What it computes in, as it did when it was trained; its weights may be stored in another type."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Tracking run ids of this model and its ancestors by stage."""
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the resolved config of the run that made it
    text_digest: str = ""
    """What tells the UMT5 that embeds its prompts from another; its 11 GB are hashed once, on import."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """Which state of its run it is, and by which number, where the run measured its states."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What it was imported from, where it comes from another tool."""


def showable(codec: Codec | None, path: str) -> Codec:
    """The codec of the model at `path`; ValueError where it has none."""
    if codec is None:
        raise ValueError(f"the model at {path} has video.codec none; its latents cannot be shown.")
    return codec


def never_trained(card: ModelCard) -> list[str]:
    """A sentence for each setting with which a model generates and was never trained; it may look worse."""
    return [
        f"rollout.{name} is {getattr(card.rollout, name)}, and the model was trained with {trained}; its "
        "videos may be worse for it."
        for name, trained in card.origin.get("untrained", {}).items()
    ]


class ModelDirectory:
    """An opened model directory; a `WeightSource` for engines."""

    def __init__(self, path: str | Path, *, verified: bool = False):
        """ValueError, in one sentence, where it is missing, unfinished, damaged or of another format.

        `verified` says that who names the model has hashed all of it, so that not every rank of a group does:
        at 14B that is 57 GB.
        """
        self.path = str(path)
        if not storage.exists(path):
            raise ValueError(
                f"there is no complete model at {path}; train one, or name a directory that has a "
                "manifest.json."
            )
        if not verified:
            storage.verify(path)
        held = ExitStack()
        self.directory = held.enter_context(storage.reading(path))
        weakref.finalize(self, held.close)  # files are opened for as long as there is this object
        try:
            body = json.loads((self.directory / "model.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no model: its model.json cannot be read ({error}).") from None
        if body.get("format") != FORMAT:
            raise ValueError(
                f"{path} has model format {body.get('format')}; this release reads format {FORMAT}."
            )
        self.card = _card(body, self.directory)
        self._weights: dict[str, Safetensors] | ForeignCheckpoint
        if (self.directory / LINK).exists():
            self._weights = _linked(self.directory / LINK, self.card.origin)
            self.shapes = self._weights.shapes
        else:
            shards = map(Safetensors, sorted(self.directory.glob("transformer-*.safetensors")))
            self._weights = {name: shard for shard in shards for name in shard.shapes}
            self.shapes = {name: shard.shapes[name] for name, shard in self._weights.items()}

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def get(self, name: str) -> Tensor:
        weights = self._weights
        return weights.get(name) if isinstance(weights, ForeignCheckpoint) else weights[name].get(name)

    def check_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError where the weights are not of these names and shapes; no weight is read."""
        check_names(self.path, wanted, self.shapes)

    def text_encoder(self, device: torch.device | str = "cpu") -> TextEncoder:
        """The prompt encoder that belongs to the model; ValueError where prompts come embedded."""
        sizes, text = self.card.transformer, self.card.text
        if text.encoder == "embedded":
            raise ValueError(f"the model at {self.path} takes embedded prompts; it cannot encode text.")
        if text.path is not None:
            embedder = umt5.Umt5Encoder(text.path, sizes.text_len, device)
            if embedder.text_dim != sizes.text_dim:
                raise ValueError(
                    f"the text encoder at {text.path} makes embeddings {embedder.text_dim} wide, and the "
                    f"model at {self.path} reads {sizes.text_dim}."
                )
            return embedder
        encoder = ByteEncoder(self.card.transformer.text_len, self.card.transformer.text_dim)
        encoder.load_state_dict(self.text_weights())
        return encoder.requires_grad_(False).to(device)

    def text_weights(self) -> dict[str, Tensor]:
        """Weights of the model's own prompt encoder; none where prompts come embedded."""
        path = self.directory / "text_encoder.safetensors"
        return load_file(path) if path.exists() else {}

    def text_digest(self) -> str:
        """SHA-256 of the prompt encoder's kind and weights: models of the same one embed prompts alike."""
        if self.card.text.path is not None:
            return self.card.text_digest or umt5.digest(self.card.text.path)
        total = hashlib.sha256(self.card.text.encoder.encode())
        for name, tensor in sorted(self.text_weights().items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


class ModelWriter:
    """Collects weights one tensor at a time and writes them in shards."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._shards = 0

    def write(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._tensors:
            save(self._tensors, self.directory / f"transformer-{self._shards:05d}.safetensors")
            self._shards += 1
            self._tensors, self._bytes = {}, 0

    def link(self, weights: ForeignCheckpoint) -> None:
        """Stand for another tool's checkpoint in place of weights; the card's `origin` says where it lies."""
        body = {
            "part": weights.part,
            "heads": weights.sizes.num_heads,
            "text_len": weights.sizes.text_len,
            "files": {path.name: storage.file_digest(path) for path in weights.layout.files},
        }
        (self.directory / LINK).write_text(json.dumps(body, indent=1))

    def finish(self, card: ModelCard, text: Mapping[str, Tensor]) -> None:
        """Write the rest: the last shard, the text encoder and the VAE if there are such, and the card."""
        self.flush()
        if card.video.vae is not None:
            copy_vae(card.video.vae, self.directory / VAE)
        if text:
            encoder = {name: tensor.detach().cpu().contiguous() for name, tensor in text.items()}
            save(encoder, self.directory / "text_encoder.safetensors")
        write_card(self.directory, card)


def write_card(directory: Path, card: ModelCard) -> None:
    """Write `model.json`. A VAE is in the directory."""
    if card.video.vae is not None:
        card = replace(card, video=replace(card.video, vae=VAE))
    body = {"format": FORMAT, "family": family_of(card.transformer), **asdict(card)}
    (directory / "model.json").write_text(json.dumps(body, indent=1))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as one safetensors file; StorageError where the disk is full."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # which is what it makes of a full disk, and no OSError
        raise storage.StorageError(f"{path} cannot be written: {error}.") from error


def origin_of(weights: ForeignCheckpoint) -> dict[str, Any]:
    """Where a checkpoint lies, and how it is now, for a card."""
    files = {str(path.absolute()): _stamp(path) for path in weights.layout.files}
    return {"path": os.path.abspath(weights.path), "layout": weights.layout.kind, "files": files}


def _linked(link: Path, origin: Mapping[str, Any]) -> ForeignCheckpoint:
    """The checkpoint that a link stands for; ValueError where it is not what it was when that was made."""
    for name, stamp in origin["files"].items():
        if _stamp(Path(name)) != stamp:
            raise ValueError(
                f"{link.parent} stands for the weights at {origin['path']}, whose {Path(name).name} is gone "
                f"or was changed since; delete {link.parent} to take them as they are now."
            )
    body = json.loads(link.read_text())
    return ForeignCheckpoint(
        origin["path"], part=body["part"], heads=body["heads"], text_len=body["text_len"]
    )


def _stamp(path: Path) -> list[int] | None:
    """Size and time of the last change of a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _card(body: Mapping[str, Any], directory: Path) -> ModelCard:
    def build(kind: type, values: Mapping[str, Any] | None) -> Any:
        if values is None:
            return None
        known = {f.name for f in fields(kind)}
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})

    video = build(VideoConfig, body["video"])
    if video.vae is not None:
        video = replace(video, vae=str(directory / VAE))
    return ModelCard(
        # Cards of earlier releases say `kind` instead, and call a causal teacher a student.
        causal=body["causal"] if "causal" in body else body["kind"] == "student",
        transformer=build(FAMILIES[body.get("family", "wan")][0], body["transformer"]),
        video=video,
        text=build(TextConfig, body["text"]),
        rollout=build(RolloutConfig, body["rollout"]),
        guidance=body.get("guidance", 0.0),
        shift=body["shift"],
        dtype=body.get("dtype", "fp32"),
        lineage=body["lineage"],
        recipe=body["recipe"],
        text_digest=body.get("text_digest", ""),
        selection=body.get("selection", {}),
        origin=body.get("origin", {}),
    )
