"""The whole weights of a training checkpoint, put together from what its ranks wrote, without the ranks.

Every rank's file holds slices of flattened parameters beside their moments; files are mapped into memory, so
that of the moments nothing is read, and of the weights one tensor at a time.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.adapters import AdapterConfig, merged
from model.backbone import WeightSource
from workers.engine_state import read_record

Which = Literal["average", "current"]


class CheckpointWeights:
    """The trained parameters of one role's checkpoint; a `WeightSource`."""

    def __init__(self, directory: Path, which: Which | None = None):
        """Open what every rank wrote into `directory`.

        Args:
            which: the averaged weights or the current ones; None takes the average where one was kept.

        Raises:
            ValueError: a rank's file is missing or damaged, or no average was kept.
        """
        self.directory = directory
        files = sorted(directory.glob("engine-*-of-*.pt"))
        if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
            raise ValueError(f"{directory} lacks files of some ranks; name a whole checkpoint.")
        self._ranks = [read_record(file)["parameters"] for file in files]
        kept = all("ema" in entry for entries in self._ranks for entry in entries.values())
        if which == "average" and not kept:
            raise ValueError(f"{directory} holds no averaged weights; export its current ones.")
        self._key = "ema" if kept and which != "current" else "value"
        self.which: Which = "average" if self._key == "ema" else "current"

    def keys(self) -> Iterable[str]:
        return self._ranks[0].keys()

    def get(self, name: str) -> Tensor:
        """The flattened parameter, in fp32."""
        pieces = sorted((entries[name] for entries in self._ranks), key=lambda entry: entry["start"])
        return torch.cat([piece[self._key] for piece in pieces])


class Shaped:
    """A checkpoint's weights in their shapes, over the base where it holds adapters of one."""

    def __init__(
        self,
        checkpoint: CheckpointWeights,
        shapes: Mapping[str, tuple[int, ...]],
        adapters: AdapterConfig,
        base: WeightSource | None,
    ):
        """ValueError where the checkpoint is of another network, or of adapters and there is no `base`."""
        self.checkpoint, self.shapes, self.adapters, self.base = checkpoint, shapes, adapters, base
        if adapters.rank and base is None:
            raise ValueError(
                f"{checkpoint.directory} holds adapters only; name the model that they are of with --base."
            )
        if not adapters.rank and set(checkpoint.keys()) != set(shapes):
            raise ValueError(f"{checkpoint.directory} does not hold the weights that its settings describe.")

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def get(self, name: str) -> Tensor:
        if self.base is None:
            return self.checkpoint.get(name).view(self.shapes[name])
        layer, weight = name.removesuffix(".weight"), self.base.get(name)
        if f"{layer}.lora_A" not in set(self.checkpoint.keys()):
            return weight
        rank = self.adapters.rank
        pair = {
            f"{layer}.lora_A": self.checkpoint.get(f"{layer}.lora_A").view(rank, weight.shape[1]),
            f"{layer}.lora_B": self.checkpoint.get(f"{layer}.lora_B").view(weight.shape[0], rank),
        }
        return merged(name, weight, pair, self.adapters)
