"""The suite `video`: what can be measured of any data and any codec, against first chunk and reference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from infra import storage
from model import video_metrics
from model.codec import to_bytes
from model.metrics import Estimate, kernel_distance
from model.text import split_words
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.suite import CLAMPED, Compared, Metric, Row, Suite, Videos, held_out_rows, row_of
from workers.dataset import ParquetDataset, is_there
from workers.model_directory import ModelDirectory

_LEVELS = {
    "brightness": "mean luma, black 0 and white 1",
    "contrast": "standard deviation of luma over a frame",
    "saturation": "mean distance between the strongest and the weakest colour of a pixel",
    "sharpness": "standard deviation of the Laplacian of luma",
}
"""Functions of `model.video_metrics`, and what they measure."""
_POOLED = 8
"""Latents are compared at no more than this many rows and columns."""


@dataclass(frozen=True)
class Prepared:
    """What videos are compared with."""

    network: str | None
    """TorchScript file, frames `[N, channels, H, W]` in [−1, 1] to features `[N, D]`; none for latents."""
    levels: Mapping[str, Tensor]  # of the reference, `[M, F]`; empty where there are no pixels
    features: Tensor | None  # of the reference, `[M, F, D]`
    low: Tensor
    """Range of the reference's latents, `[C]`, infinite where there are none; and how they are normalised."""
    high: Tensor
    mean: Tensor
    std: Tensor

    def features_of(self, videos: Videos) -> Tensor:
        """`[N, F, D]`: the network's of frames, else normalised latents, pooled."""
        if self.network is not None:
            return _features(self.network, videos.frames())
        assert videos.latents is not None, "the suite asks for latents"
        normal = (videos.latents.float() - self.mean[:, None, None]) / self.std[:, None, None]
        size = (min(_POOLED, normal.shape[-2]), min(_POOLED, normal.shape[-1]))
        return F.adaptive_avg_pool2d(normal.flatten(0, 1), size).flatten(1).unflatten(0, normal.shape[:2])


class Video(Suite):
    title = "Evaluation of videos"
    version = 1
    metrics: ClassVar = {
        **{
            f"{name}_drift": Metric(
                f"{name}: drift from the first chunk",
                "drift.png",
                f"how far {name} ({words}) is from its mean over the same video's first chunk; mean over "
                "videos.",
            )
            for name, words in _LEVELS.items()
        },
        **{
            f"{name}_gap": Metric(
                f"{name}: gap to the reference",
                "gap.png",
                f"mean {name} minus that of the reference at the same frame index.",
            )
            for name in _LEVELS
        },
        "flicker": Metric(
            "flicker",
            "motion.png",
            "energy of high temporal frequency: mean square of luma under the filter (−1, 2, −1) / 4 over "
            "time.",
        ),
        "motion": Metric("motion", "motion.png", "mean absolute change of luma from the frame before."),
        "out_of_range": Metric(
            "share of latents out of range",
            "latents.png",
            "the share of latents outside the range, channel by channel, of the reference's.",
        ),
        "clamped": CLAMPED,
        "kernel_distance": Metric(
            "kernel distance to the reference",
            "latents.png",
            "unbiased squared maximum mean discrepancy to the reference at the same frame index, of "
            f"latents normalised by the reference's and pooled to at most {_POOLED} × {_POOLED}, or of the "
            "features of evaluate.features.",
        ),
    }
    headline = "brightness_drift"
    compared: ClassVar = {
        **{f"{name}_drift_{span}": Compared(-1, 0.02) for name in _LEVELS for span in ("inside", "beyond")},
        "flicker_overall": Compared(-1, 0.005),
        "motion_overall": Compared(1, 0.02),
        "out_of_range_overall": Compared(-1, 0.02),
        "kernel_distance_overall": Compared(-1, 0.05),
    }
    latents = True
    notes = (
        "Frames after the reference's last are compared with its last frame.",
        "A video that stands still has neither drift nor flicker: read them together with motion.",
        "Saturation of videos without colour is not defined, and no metric of pixels is where a model has "
        "no codec.",
        "Intervals of the kernel distance over several frames are means of the frames' intervals.",
    )

    def check(self, config: RunConfig, models: Mapping[str, ModelDirectory]) -> None:
        cards = {name: model.card.video for name, model in models.items()}
        first, card = next(iter(cards.items()))
        shape, codec = card.shape[1:], card.make_codec()
        for name, video in cards.items():
            if (video.shape[1:], video.codec) != (shape, card.codec):
                raise ValueError(
                    f"the {first} and the {name} model make videos of other shapes: latents of {shape} with "
                    f"codec {card.codec}, and of {video.shape[1:]} with codec {video.codec}; name models of "
                    "one."
                )
        if config.evaluate.features is not None:
            if codec is None:
                raise ValueError("evaluate.features reads frames, and the models have video.codec none.")
            _features(config.evaluate.features, torch.zeros(1, *codec.shape((1, *shape))))
        words = min(model.card.transformer.text_len for model in models.values())
        by_words = all(model.card.text.encoder == "bytes" for model in models.values())
        for prompt in self.prompts(config):
            if by_words and len(split_words(prompt)) > words:
                raise ValueError(
                    f"the prompt {shorten(prompt, 60)!r} to evaluate with has more words than the {words} "
                    "that the models read; shorten it."
                )

    def prompts(self, config: RunConfig) -> list[str]:
        """Those of `evaluate.prompts`, else of held-out videos, else of training data; at most `videos`."""
        settings, skip, found = config.evaluate, config.data.skip_damaged, []
        if settings.prompts is not None:
            try:
                with storage.fetched(settings.prompts) as file:
                    lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
                found = list(filter(None, lines))
            except (OSError, ValueError) as error:
                raise ValueError(f"evaluate.prompts cannot be read as a text file: {error}.") from None
        else:
            for path in (config.data.held_out, config.data.train):
                if not found and "prompt" in _columns(path, skip):
                    rows = ParquetDataset(path, ["prompt"], skip_damaged=skip)
                    found = [rows.row(i)["prompt"] for i in range(len(rows))]
        if not found:
            raise ValueError(
                "there are no prompts to evaluate with: evaluate.prompts must name a text file of one "
                "prompt a line, or data.held_out or data.train a data set with the column prompt."
            )
        return list(dict.fromkeys(found))[: settings.videos]

    def held_out(
        self, config: RunConfig, models: Mapping[str, ModelDirectory]
    ) -> tuple[Videos, Videos] | None:
        path, skip = config.data.held_out, config.data.skip_damaged
        columns = _columns(path, skip)
        column = next((name for name in ("video", "latent") if name in columns), None)
        if column is None:
            return None
        card = next(iter(models.values())).card.video
        codec = card.make_codec()
        if codec is None and column == "video":
            said = "holds pixels and the models have no codec; they are not compared"
            say(f"evaluate: data.held_out at {path} {said}")
            return None
        words = ["prompt"] if "prompt" in columns else []
        count, rows = held_out_rows(config, ParquetDataset(path, [column, *words], skip_damaged=skip))
        frames = min(len(rows[0][column]), config.evaluate.frames)
        shape = torch.Size(card.shape[1:])
        if codec is not None and column == "video":
            shape = torch.Size(codec.shape((1, *shape))[1:])
        for row in rows:
            if row[column].shape[1:] != shape or len(row[column]) < frames:
                raise ValueError(
                    f"data.held_out at {path} holds a video of shape {tuple(row[column].shape)} in the "
                    f"column {column}; evaluation needs at least {frames} frames of {tuple(shape)}."
                )
        latents = stored = torch.stack([row[column][:frames].float() for row in rows])
        pixels = None
        if codec is not None:
            if column == "video":
                latents = codec.encode(stored)
            pixels = to_bytes(stored if column == "video" else codec.decode(stored))
        videos = Videos([row.get("prompt", "") for row in rows], pixels, latents)
        return videos[:count], videos[count:]

    def prepare(self, config: RunConfig, reference: Videos | None) -> Prepared:
        network = config.evaluate.features
        if reference is None or reference.latents is None:
            nothing = torch.full((1,), math.inf)
            return Prepared(network, {}, None, -nothing, nothing, nothing, nothing)
        by_channel = reference.latents.float().transpose(0, 2).flatten(1)
        low, high, mean, std = by_channel.amin(1), by_channel.amax(1), by_channel.mean(1), by_channel.std(1)
        prepared = Prepared(network, _levels(reference), None, low, high, mean, std.clamp(min=1e-6))
        return replace(prepared, features=prepared.features_of(reference))

    def measure(self, prepared: Any, videos: Videos, *, chunk: int, trained: int, seed: int) -> Row:
        assert videos.latents is not None, "the suite asks for latents"
        count, length = videos.latents.shape[:2]
        undefined = torch.full((count, length), math.nan)
        if videos.pixels is not None:  # of a VAE a latent frame makes several of pixels
            length = videos.pixels.shape[1]
            undefined = torch.full((count, length), math.nan)
        levels = _levels(videos)
        values = {f"{n}_drift": video_metrics.drift(levels.get(n, undefined), chunk) for n in _LEVELS}
        for name in _LEVELS:
            values[f"{name}_gap"] = levels.get(name, undefined) if name in prepared.levels else undefined
        references = {f"{n}_gap": _as_long_as(level, length) for n, level in prepared.levels.items()}
        for name in ("flicker", "motion"):
            shown = videos.pixels is not None
            values[name] = getattr(video_metrics, name)(videos.frames()) if shown else undefined
        values["out_of_range"], distance = undefined, Estimate.undefined(length)
        if prepared.features is not None:
            outside = video_metrics.share_outside(videos.latents, prepared.low, prepared.high)
            values["out_of_range"] = _by_pixels(outside, length)
            features = prepared.features_of(videos)
            real = _as_long_as(prepared.features, features.shape[1])
            distance = kernel_distance(features, real, seed=seed)
            if features.shape[1] != length:
                distance = Estimate(*(_by_pixels(each, length) for each in distance))
        values["clamped"] = videos.clamped_shares()
        return row_of(
            values,
            references=references,
            others={"kernel_distance": distance},
            chunk=chunk,
            trained=trained,
            seed=seed,
        )

    def basis(self, config: RunConfig) -> dict[str, str]:
        path = config.evaluate.features
        if path is None:
            return {"features": "none"}
        with storage.fetched(path) as file:
            return {"features": storage.file_digest(file)[:16]}


def _columns(path: str, skip_damaged: bool) -> list[str]:
    """Columns of a data set; none where there is no such one."""
    return ParquetDataset(path, [], skip_damaged=skip_damaged).schema.names if is_there(path) else []


def _levels(videos: Videos) -> dict[str, Tensor]:
    """Each level of the videos, `[N, F]`; none where there are no pixels."""
    if videos.pixels is None:
        return {}
    frames = videos.frames()
    return {name: getattr(video_metrics, name)(frames) for name in _LEVELS}


def _by_pixels(values: Tensor, length: int) -> Tensor:
    """What is known by latent frame `[…, F]`, by the `length` frames of pixels that these make: of a VAE the
    first one makes one, and each later one as many as the others."""
    latents = values.shape[-1]
    each = max(1, (length - 1) // max(1, latents - 1))
    index = (torch.arange(length) - 1).div(each, rounding_mode="floor") + 1
    return values[..., index.clamp(max=latents - 1)]


def _as_long_as(reference: Tensor, length: int) -> Tensor:
    """The reference `[M, F, …]` at `length` frame indices: after its last frame, that one."""
    return reference[:, torch.arange(length).clamp(max=reference.shape[1] - 1)]


@torch.inference_mode()
def _features(path: str, frames: Tensor) -> Tensor:
    """A network's features `[N, F, D]` of frames `[N, F, channels, H, W]`; ValueError where it gives none."""
    try:
        with storage.fetched(path) as file:
            network = torch.jit.load(str(file), map_location="cpu").eval()
        features = torch.cat([network(part) for part in frames.flatten(0, 1).split(256)])
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"evaluate.features: {path} is no TorchScript network that reads frames of "
            f"{tuple(frames.shape[2:])} ({reason})."
        ) from None
    if features.ndim != 2:
        raise ValueError(
            f"evaluate.features: the network at {path} gives {tuple(features.shape)} for {len(features)} "
            "frames; it must give one vector a frame."
        )
    return features.unflatten(0, frames.shape[:2])


SUITE = Video()
