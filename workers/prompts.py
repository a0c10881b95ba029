"""Prompts as embeddings, and videos of the data as latents."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from workers.dataset import ParquetDataset, Row
from workers.model_directory import ModelDirectory, VideoConfig


class PromptWorker:
    """An actor that reads prompts and hands out their embeddings, one reference a sample."""

    def __init__(self, path: str, seed: int, model: str, real: str | None = None):
        """`model` names the directory whose encoder embeds prompts, unless the data sets hold an `embedding` column; `real` is a data
        set of videos, if any are asked for.
        """
        source = ModelDirectory(model)
        self._embedded = source.card.text.encoder == "embedded"
        self._data = ParquetDataset(path, ["embedding"] if self._embedded else ["prompt"])
        self._encoder = None if self._embedded else source.text_encoder()
        self._seed = seed
        self._real = None if real is None else LatentDataset(real, source.card.video, embedded=self._embedded)

    def batch(self, position: int, size: int) -> list[Tensor] | Tensor:
        """Embeddings [text_len, text_dim] of samples `position …`, in the seeded order."""
        rows = self._data.batch(position, size, self._seed)
        if self._embedded:
            return unwrapped([row["embedding"] for row in rows])
        return unwrapped(self._encode([row["prompt"] for row in rows]))

    def data(self, position: int, size: int) -> list[Tensor]:
        """Latents [F, C, H, W] of samples `position …`, in the seeded order, then their embeddings."""
        if self._real is None:
            raise ValueError("there are no real videos: data.real must name a data set of them.")
        latents, prompts = self._real.batch(position, size, self._seed)
        return [*latents, *(prompts if self._embedded else self._encode(prompts))]

    def unconditional(self, prompt: str, file: str | None) -> Tensor:
        """Embedding of the negative prompt: of its text, or from `file` where prompts come embedded."""
        return self._encode([prompt])[0] if file is None else load_file(file)["embedding"]

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        if self._encoder is None:
            raise ValueError(
                "prompts come embedded, so distill.roles.teacher.negative_embedding must name the negative one's file."
            )
        return [embedding.clone() for embedding in self._encoder.encode(prompts)]


class LatentDataset:
    """Latents and prompts of a data set that holds either latents or videos of pixels."""

    def __init__(self, path: str, video: VideoConfig, *, embedded: bool):
        """ValueError where it is missing, or its videos do not have the shape that `video` says."""
        self._prompt = "embedding" if embedded else "prompt"
        self._codec = video.make_codec()
        self._video = "latent" if self._codec is None else "video"
        self._data = ParquetDataset(path, [self._prompt, self._video])
        found = tuple(self._latents([self._data.row(0)])[0].shape)
        if found != video.shape:
            raise ValueError(
                f"data.real at {path} holds latents of {list(found)}, and `video` says {list(video.shape)}."
            )

    def batch(self, position: int, size: int, seed: int) -> tuple[list[Tensor], list[Any]]:
        """Latents and prompts of samples `position …`, in the seeded order."""
        rows = self._data.batch(position, size, seed)
        return self._latents(rows), [row[self._prompt] for row in rows]

    def _latents(self, rows: list[Row]) -> list[Tensor]:
        videos = torch.stack([row[self._video] for row in rows])
        return [latent.clone() for latent in (videos if self._codec is None else self._codec.encode(videos))]


def unwrapped(embeddings: list[Tensor]) -> list[Tensor] | Tensor:
    """Ray splits a list over several references, but hands a list of one over as it is."""
    return embeddings if len(embeddings) > 1 else embeddings[0]
