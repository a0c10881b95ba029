"""Prompts as embeddings, and videos of the data as latents."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from model.text import pad
from workers.actor import Stats, Worker
from workers.batch import Batch
from workers.dataset import ParquetDataset, Row
from workers.model_directory import ModelDirectory, VideoConfig


class Prompts:
    """How a model's prompts become embeddings: by its own encoder, or they come embedded in the data set."""

    def __init__(self, model: ModelDirectory, device: torch.device | str = "cpu"):
        self.column = model.card.text.column
        self._encoder = model.text_encoder(device) if self.column == "prompt" else None
        self._text_len = model.card.transformer.text_len

    def embed(self, values: Sequence[Any]) -> list[Tensor]:
        """Embeddings [text_len, text_dim] of values of `column`."""
        if self._encoder is None:
            return [pad(value, self._text_len) for value in values]
        return [embedding.clone() for embedding in self._encoder.encode(list(values))]

    def negative(self, prompt: str, file: str | None) -> Tensor:
        """Embedding of the negative prompt: of its text, or from `file` where prompts come embedded."""
        if file is not None:
            with storage.fetched(file) as here:
                return pad(load_file(here)["embedding"].clone(), self._text_len)
        if self._encoder is None:
            raise ValueError(
                "prompts come embedded, so distill.roles.teacher.negative_embedding must name the negative "
                "one's file."
            )
        return self.embed([prompt])[0]


class PromptWorker(Worker):
    """An actor that reads prompts and hands out their embeddings, and videos of the data."""

    def __init__(
        self, path: str, seed: int, model: str, real: str | None = None, *, skip_damaged: bool = False
    ):
        """`model` names the directory whose encoder embeds prompts, unless the data sets hold an `embedding`
        column; `real` is a data set of videos, if any are asked for."""
        self._path, self._real_path, self._skip_damaged = path, real, skip_damaged
        self._seed, self._model = seed, model

    def open(self) -> None:
        """Load the encoder and look at the data sets; ValueError where something is missing or damaged."""
        source, skip = ModelDirectory(self._model, verified=True), self._skip_damaged
        self._prompts = Prompts(source)
        column = self._prompts.column
        self._data = ParquetDataset(self._path, [column], skip_damaged=skip)
        self._real = None
        if self._real_path is not None:
            self._real = LatentDataset(self._real_path, source.card.video, column, skip_damaged=skip)

    def prompts(self, position: int, batch: Batch) -> tuple[Stats, Batch]:
        """The `context` [text_len, text_dim] of a prompt for each sample, from `position` of the seeded
        order."""
        rows = self._data.batch(position, len(batch), self._seed)
        contexts = self._prompts.embed([row[self._prompts.column] for row in rows])
        return {}, Batch(batch.samples, {"context": torch.stack(contexts)})

    def videos(self, position: int, batch: Batch) -> tuple[Stats, Batch]:
        """The `video` [F, C, H, W] and `context` of as many videos of the data, likewise."""
        if self._real is None:
            raise ValueError("there are no real videos: data.real must name a data set of them.")
        latents, prompts = self._real.batch(position, len(batch), self._seed)
        contexts = self._prompts.embed(prompts)
        return {}, Batch(batch.samples, {"video": torch.stack(latents), "context": torch.stack(contexts)})

    def negative(self, prompt: str, file: str | None) -> Tensor:
        """Embedding of the negative prompt: of its text, or from `file` where prompts come embedded."""
        return self._prompts.negative(prompt, file)


class LatentDataset:
    """Latents and prompts of a data set that holds either latents or videos of pixels."""

    def __init__(self, path: str, video: VideoConfig, prompts: str, *, skip_damaged: bool = False):
        """`prompts` names their column. ValueError where it is missing; `data_check` checks the rest."""
        self._prompts = prompts
        self._codec = video.make_codec() if video.column == "video" else None
        self._video = video.column
        self._data = ParquetDataset(path, [prompts, self._video], skip_damaged=skip_damaged)

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, position: int, size: int, seed: int) -> tuple[list[Tensor], list[Any]]:
        """Latents and values of the prompts' column of samples `position …`, in the seeded order."""
        rows = self._data.batch(position, size, seed)
        return self._latents(rows), [row[self._prompts] for row in rows]

    def _latents(self, rows: list[Row]) -> list[Tensor]:
        videos = torch.stack([row[self._video] for row in rows])
        return [latent.clone() for latent in (videos if self._codec is None else self._codec.encode(videos))]
