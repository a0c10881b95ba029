"""The suite `video`: what can be measured of any data and any codec, against the first chunk and against a
reference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from model import video_metrics
from model.metrics import Estimate, difference_of_means, kernel_distance, mean_over_videos
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.suite import Compared, Metric, Row, Suite, Videos, row_of
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory

REFERENCE_VIDEOS = 400
"""Held-out videos that others are compared with."""
_LEVELS = {
    "brightness": (video_metrics.brightness, "mean luma, black 0 and white 1"),
    "contrast": (video_metrics.contrast, "standard deviation of luma over a frame"),
    "saturation": (
        video_metrics.saturation,
        "mean distance between the strongest and the weakest colour of a pixel",
    ),
    "sharpness": (video_metrics.sharpness, "standard deviation of the Laplacian of luma"),
}
_POOLED = 8
"""Latents are compared at no more than this many rows and columns."""


@dataclass(frozen=True)
class Prepared:
    """What videos are compared with."""

    network: str | None
    """TorchScript file of frames `[N, channels, H, W]` in [−1, 1] to features `[N, D]`; none compares
    latents."""
    levels: Mapping[str, Tensor]
    """Of the reference, by level, `[M, F]`; empty where there are no pixels."""
    features: Tensor | None
    """Of the reference, `[M, F, D]`."""
    low: Tensor
    """Range of the reference's latents, `[C]`, infinite where there are none; and how they are normalised."""
    high: Tensor
    mean: Tensor
    std: Tensor


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
            for name, (_, words) in _LEVELS.items()
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
        "kernel_distance": Metric(
            "kernel distance to the reference",
            "latents.png",
            "unbiased squared maximum mean discrepancy to the reference at the same frame index, of latents "
            "normalised "
            f"by the reference's and pooled to at most {_POOLED} × {_POOLED}, or of the features of "
            "evaluate.features.",
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
        first = next(iter(cards))
        for name, video in cards.items():
            if (video.shape[1:], video.codec) != (cards[first].shape[1:], cards[first].codec):
                raise ValueError(
                    f"the {first} and the {name} model make videos of other shapes: latents of "
                    f"{cards[first].shape[1:]} with "
                    f"codec {cards[first].codec}, and of {video.shape[1:]} with codec {video.codec}; name "
                    "models of one."
                )
        if config.evaluate.features is not None:
            codec = cards[first].make_codec()
            if codec is None:
                raise ValueError("evaluate.features reads frames, and the models have video.codec none.")
            _features(config.evaluate.features, codec.decode(torch.zeros(1, 1, *cards[first].shape[1:])))
        self.prompts(config)

    def prompts(self, config: RunConfig) -> list[str]:
        """Those of `evaluate.prompts`, else of the held-out videos, else of the training data; no more than
        videos."""
        settings, data = config.evaluate, config.data
        if settings.prompts is not None:
            try:
                lines = Path(settings.prompts).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"evaluate.prompts cannot be read as a text file: {error}.") from None
            found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        else:
            found = []
            for path in (data.held_out, data.train):
                if not found and "prompt" in _columns(path):
                    rows = ParquetDataset(path, ["prompt"])
                    found = list(dict.fromkeys(rows.row(i)["prompt"] for i in range(len(rows))))
        if not found:
            raise ValueError(
                "there are no prompts to evaluate with: evaluate.prompts must name a text file of one "
                "prompt a line, or "
                "data.held_out or data.train a data set with the column prompt."
            )
        return found[: settings.videos]

    def held_out(
        self, config: RunConfig, models: Mapping[str, ModelDirectory]
    ) -> tuple[Videos, Videos] | None:
        path = config.data.held_out
        columns = _columns(path)
        column = next((name for name in ("video", "latent") if name in columns), None)
        if column is None:
            return None
        card = next(iter(models.values())).card.video
        codec = card.make_codec()
        if codec is None and column == "video":
            say(
                f"evaluate: data.held_out at {path} holds pixels and the models have no codec; they are not "
                "compared"
            )
            return None
        data = ParquetDataset(path, [column])
        count = min(config.evaluate.videos, len(data) // 2)
        if count < 2:
            raise ValueError(
                f"data.held_out at {path} holds {len(data)} videos; evaluation needs at least 4."
            )
        frames = min(len(data.row(0)[column]), config.evaluate.frames)
        rows = [data.row(i)[column] for i in range(min(len(data), count + max(count, REFERENCE_VIDEOS)))]
        wanted = torch.zeros(1, 1, *card.shape[1:])
        shape = (codec.decode(wanted) if codec is not None and column == "video" else wanted).shape[2:]
        for row in rows:
            if row.shape[1:] != shape or len(row) < frames:
                raise ValueError(
                    f"data.held_out at {path} holds a video of shape {tuple(row.shape)} in the column "
                    f"{column}; evaluation "
                    f"needs at least {frames} frames of {tuple(shape)}."
                )
        stored = torch.stack([row[:frames].float() for row in rows])
        latents = codec.encode(stored) if codec is not None and column == "video" else stored
        pixels = None
        if codec is not None:
            shown = stored if column == "video" else codec.decode(latents)
            pixels = ((shown.clamp(-1, 1) + 1) * 127.5).round().byte()
        prompts = [""] * len(rows)
        if "prompt" in columns:
            words = ParquetDataset(path, ["prompt"])
            prompts = [words.row(i)["prompt"] for i in range(len(rows))]
        videos = Videos(prompts, pixels, latents)
        return videos[:count], videos[count:]

    def prepare(self, config: RunConfig, reference: Videos | None) -> Prepared:
        network = config.evaluate.features
        if reference is None or reference.latents is None:
            nothing = torch.full((1,), math.inf)
            return Prepared(network, {}, None, -nothing, nothing, nothing, nothing)
        by_channel = reference.latents.float().transpose(0, 2).flatten(1)
        mean, std = by_channel.mean(1), by_channel.std(1).clamp(min=1e-6)
        levels = {}
        if reference.pixels is not None:
            levels = {name: level(reference.frames()) for name, (level, _) in _LEVELS.items()}
        if network is not None:
            features = _features(network, reference.frames())
        else:
            features = _pooled(reference.latents, mean, std)
        return Prepared(network, levels, features, by_channel.amin(1), by_channel.amax(1), mean, std)

    def measure(self, prepared: Any, videos: Videos, *, chunk: int, trained: int, seed: int) -> Row:
        assert videos.latents is not None, "the suite asks for latents"
        count, length = videos.latents.shape[:2]
        undefined = torch.full((count, length), math.nan)
        frames = None if videos.pixels is None else videos.frames()
        levels = {
            name: undefined if frames is None else level(frames) for name, (level, _) in _LEVELS.items()
        }
        values: dict[str, Tensor] = {}
        references: dict[str, Tensor] = {}
        for name, level in levels.items():
            values[f"{name}_drift"] = video_metrics.drift(level, chunk)
        for name, level in levels.items():
            values[f"{name}_gap"] = level if name in prepared.levels else undefined
            if name in prepared.levels:
                references[f"{name}_gap"] = _as_long_as(prepared.levels[name], length)
        values["flicker"] = undefined if frames is None else video_metrics.flicker(frames)
        values["motion"] = undefined if frames is None else video_metrics.motion(frames)
        values["out_of_range"] = undefined
        nothing = Estimate(undefined[0], undefined[0], undefined[0])
        distance = nothing
        if prepared.features is not None:
            values["out_of_range"] = video_metrics.share_outside(videos.latents, prepared.low, prepared.high)
            if prepared.network is not None:
                features = _features(prepared.network, videos.frames())
            else:
                features = _pooled(videos.latents, prepared.mean, prepared.std)
            distance = kernel_distance(features, _as_long_as(prepared.features, length), seed=seed)
        by_frame = {
            name: difference_of_means(each, references[name], seed=seed)
            if name in references
            else mean_over_videos(each, seed=seed)
            for name, each in values.items()
        }
        by_frame["kernel_distance"] = distance
        return row_of(by_frame, values=values, references=references, chunk=chunk, trained=trained, seed=seed)

    def basis(self, config: RunConfig) -> dict[str, str]:
        features = config.evaluate.features
        return {
            "features": "none" if features is None else sha256(Path(features).read_bytes()).hexdigest()[:16]
        }


def _columns(path: str) -> list[str]:
    """Columns of a data set; none where there is no such one."""
    place = Path(path)
    shard = place if place.is_file() else next(iter(sorted(place.glob("*.parquet"))), None)
    return [] if shard is None else pq.read_schema(shard).names


def _as_long_as(reference: Tensor, length: int) -> Tensor:
    """The reference `[M, F, …]` at `length` frame indices: after its last frame, that one."""
    return reference[:, torch.arange(length).clamp(max=reference.shape[1] - 1)]


def _pooled(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised latents as features `[N, F, D]`."""
    normal = (latents.float() - mean[:, None, None]) / std[:, None, None]
    size = (min(_POOLED, latents.shape[-2]), min(_POOLED, latents.shape[-1]))
    return F.adaptive_avg_pool2d(normal.flatten(0, 1), size).flatten(1).unflatten(0, latents.shape[:2])


@torch.inference_mode()
def _features(path: str, frames: Tensor) -> Tensor:
    """A network's features `[N, F, D]` of frames `[N, F, channels, H, W]`; ValueError where it is none or
    gives none."""
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
        parts = [network(part) for part in frames.flatten(0, 1).split(256)]
        features = torch.cat(parts)
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"evaluate.features: {path} is no TorchScript network that reads frames of "
            f"{tuple(frames.shape[2:])} ({reason})."
        ) from None
    if features.ndim != 2:
        raise ValueError(
            f"evaluate.features: the network at {path} gives {tuple(features.shape)} for {len(features)} "
            "frames; it must "
            "give one vector a frame."
        )
    return features.unflatten(0, frames.shape[:2])


SUITE = Video()
