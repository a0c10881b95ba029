"""Prompts as embeddings, and videos of the data as latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from model.text import pad
from workers.batch import Read, Source
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


@dataclass(frozen=True)
class TrainingData:
    """The data of a distillation, of which every rank reads what it was asked to.

    Data sets and the encoder are opened when they are first used, in the process that uses them.
    """

    path: str
    """Data set of prompts."""
    real: str | None
    """Data set of videos, if any are asked for."""
    seed: int
    model: str
    """Directory of the model whose encoder embeds prompts, unless they come embedded."""
    batch: int
    """Samples of a batch: after one of them, that of the next batch is read ahead."""
    skip_damaged: bool = False

    def read(self, wanted: Sequence[Read]) -> list[Tensor]:
        """`context` [text_len, text_dim] or `video` [F, C, H, W] of each, in the seeded order of its data
        set; ValueError where something is missing or damaged."""
        places = dict.fromkeys((each.data, each.position) for each in wanted)
        for data, position in places:
            self._of(data).ahead(position, 1, self.seed)
        rows = {place: self._of(place[0]).batch(place[1], 1, self.seed) for place in places}
        for data, position in places:
            self._of(data).ahead(position + self.batch, 1, self.seed)
        return [self._made(each, *rows[each.data, each.position]) for each in wanted]

    def _made(self, wanted: Read, row: Row) -> Tensor:
        if wanted.column == "video":
            return self._videos.latents([row])[0]
        return self.prompts.embed([row[self.prompts.column]])[0]

    def _of(self, data: Source) -> ParquetDataset:
        return self._prompts if data == "train" else self._videos.data

    @cached_property
    def _source(self) -> ModelDirectory:
        return ModelDirectory(self.model, verified=True)

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self._source)

    @cached_property
    def _prompts(self) -> ParquetDataset:
        return ParquetDataset(self.path, [self.prompts.column], skip_damaged=self.skip_damaged)

    @cached_property
    def _videos(self) -> "LatentDataset":
        if self.real is None:
            raise ValueError("there are no real videos: data.real must name a data set of them.")
        video = self._source.card.video
        return LatentDataset(self.real, video, self.prompts.column, skip_damaged=self.skip_damaged)


class LatentDataset:
    """Latents and prompts of a data set that holds either latents or videos of pixels."""

    def __init__(self, path: str, video: VideoConfig, prompts: str, *, skip_damaged: bool = False):
        """`prompts` names their column. ValueError where it is missing; `data_check` checks the rest."""
        self._prompts = prompts
        self._codec = video.make_codec() if video.column == "video" else None
        self._video = video.column
        self.data = ParquetDataset(path, [prompts, self._video], skip_damaged=skip_damaged)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, position: int, size: int, seed: int) -> tuple[list[Tensor], list[Any]]:
        """Latents and values of the prompts' column of samples `position …`, in the seeded order."""
        rows = self.data.batch(position, size, seed)
        return self.latents(rows), [row[self._prompts] for row in rows]

    def latents(self, rows: Sequence[Row]) -> list[Tensor]:
        """The latents of rows of `data`."""
        videos = torch.stack([row[self._video] for row in rows])
        return [latent.clone() for latent in (videos if self._codec is None else self._codec.encode(videos))]
