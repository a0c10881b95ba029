"""What crosses actors: named columns with one entry a sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Source = Literal["train", "real"]
"""Data sets: of prompts, and of videos with their prompts."""


@dataclass(frozen=True)
class Read:
    """What stands for a sample's tensor that its reader has to read from the data: nobody sends it."""

    data: Source
    column: Literal["context", "video"]
    position: int  # in the data set's seeded order


@dataclass(frozen=True)
class Batch:
    """Samples and what is known of each: `video` and `context` of the student's, `data_video` and
    `data_context` of the data, predictions, gradients.

    A column is a tensor [B, …] in a worker. Outside it is a list of references, one a sample, or of what is
    to be read from the data, so that groups of different sizes share them out differently without looking.
    """

    samples: list[int] = field(default_factory=list)
    """Indices in the update's batch, from which a sample's randomness follows."""
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __or__(self, other: "Batch") -> "Batch":
        """The columns of both, which are of the same samples."""
        assert self.samples == other.samples, "columns of different samples"
        return Batch(self.samples, {**self.columns, **other.columns})

    def select(self, *names: str) -> "Batch":
        return Batch(self.samples, {name: self.columns[name] for name in names})

    def prefixed(self, prefix: str) -> "Batch":
        return Batch(self.samples, {prefix + name: column for name, column in self.columns.items()})

    def rows(self, start: int, stop: int) -> "Batch":
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        return Batch(self.samples[start:stop], columns)

    @staticmethod
    def joined(parts: Sequence["Batch"]) -> "Batch":
        """The samples of all parts, which have the same columns of references."""
        columns = {name: [each for part in parts for each in part[name]] for name in parts[0].columns}
        return Batch([sample for part in parts for sample in part.samples], columns)

    @staticmethod
    def stacked(
        samples: list[int], names: Sequence[str], tensors: Sequence[Tensor], device: torch.device
    ) -> "Batch":
        """Columns [B, …] of tensors one a sample, column after column.

        What comes out of the object store is read-only until it is copied.
        """
        size = len(samples)
        columns = {
            name: torch.stack(list(tensors[index * size : (index + 1) * size])).to(device)
            for index, name in enumerate(names)
        }
        return Batch(samples, columns)

    def unstacked(self, names: Sequence[str]) -> list[Tensor]:
        """Tensors one a sample, column after column, on the CPU; copies, as a view carries the whole
        column."""
        return [sample.clone() for name in names for sample in self.columns[name].detach().cpu()]
