"""The training state of an engine in files: a file a rank, with its slices of fp32 parameters, by name.

A slice knows where it begins in its flattened parameter, so any number of ranks at any ZeRO stage reads them.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from workers import zero

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """One rank's training state as it was, to be written while training goes on."""

    record: Mapping[str, Any]
    name: str

    def write(self, directory: str | Path) -> None:
        """Write the file of this rank; `TrainEngine.load` reads it."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        torch.save(dict(self.record), Path(directory) / self.name)

    def arrays(self) -> dict[str, Any]:
        """The record with NumPy arrays, which Ray's object store takes and gives back without copies."""
        return _converted(self.record, torch.Tensor, torch.Tensor.numpy)


def path_of(directory: str | Path) -> Path:
    return Path(directory) / _file_name(dist.get_rank(), dist.get_world_size())


def _file_name(rank: int, ranks: int) -> str:
    return f"engine-{rank:05d}-of-{ranks:05d}.pt"


class SavedState:
    """What all ranks saved: slices of flattened parameters, mapped from files rather than read.

    A rank of the same layout finds its slices in the file of its own number, and opens no other.
    """

    def __init__(self, records: list[dict[str, Any]], what: str, *, own: bool):
        """`own` is whether the only record is of this rank, in the layout of now."""
        self._records, self._words, self._own = records, what, own

    @classmethod
    def of_arrays(cls, record: Mapping[str, Any]) -> Self:
        """What `Snapshot.arrays` gave on this rank, in the layout of now."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what comes out of the store is read-only, and read
            tensors = _converted(record, np.ndarray, torch.from_numpy)
        return cls([tensors], "the snapshot", own=True)

    @classmethod
    def read(cls, directory: str | Path, stage: int) -> Self:
        """From files; ValueError where a rank's is missing or damaged."""
        what = f"the checkpoint in {directory}"
        files = sorted(Path(directory).glob("engine-*-of-*.pt"))
        own = path_of(directory)
        if own in files:
            record = read_record(own)
            if record["stage"] == stage:
                return cls([record], what, own=True)
        ranks = max(
            (int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))), default=0
        )
        for rank in range(max(ranks, 1)):
            path = Path(directory) / _file_name(rank, ranks or dist.get_world_size())
            if not path.exists():
                raise ValueError(f"the checkpoint file {path} is missing: resume from a whole checkpoint")
        return cls([read_record(file) for file in files], what, own=False)

    def __str__(self) -> str:
        return self._words

    @property
    def version(self) -> int:
        return self._records[0]["version"]

    def _slices(self, name: str) -> list[dict[str, Any]]:
        return [each["parameters"][name] for each in self._records if name in each["parameters"]]

    def has(self, name: str, key: str) -> bool:
        return all(key in entry for entry in self._slices(name))

    def check_names(self, expected: Iterable[str]) -> None:
        """ValueError where it has other parameters than these."""
        check_names(expected, self._records[0]["parameters"], self._words)

    def check(self, name: str, total: int, piece: zero.Slice) -> None:
        """ValueError where the parameter was of another size."""
        slices = self._slices(name)
        if not slices:
            return  # which `check_names` tells better
        if self._own:
            fits = (slices[0]["start"], slices[0]["value"].numel()) == (piece.start, piece.value.numel())
        else:
            fits = sum(entry["value"].numel() for entry in slices) == total
        if not fits:
            raise ValueError(f"{self} has {name} in another size: use the model that it was written with")

    def part(self, name: str, key: str, piece: zero.Slice) -> Tensor:
        """The numbers under a slice of this rank."""
        start, count = piece.start, piece.value.numel()
        found = torch.empty(count)
        for entry in self._slices(name):
            first, last = max(start, entry["start"]), min(start + count, entry["start"] + entry[key].numel())
            if first < last:
                kept = entry[key].view(-1)[first - entry["start"] : last - entry["start"]]
                if last - first == count:
                    return kept
                found[first - start : last - start] = kept
        return found


def _converted(value: Any, kind: type, how: Callable[[Any], Any]) -> Any:
    """The same tree, with what is of a kind converted."""
    if isinstance(value, Mapping):
        return {name: _converted(each, kind, how) for name, each in value.items()}
    return how(value) if isinstance(value, kind) else value


def read_record(path: Path) -> dict[str, Any]:
    """What one rank saved, its tensors mapped from the file; ValueError where it is damaged or of another
    format."""
    try:
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint file {path} is damaged: use an older checkpoint") from error
    if record["format"] != FORMAT:
        raise ValueError(
            f"the checkpoint file {path} has format {record['format']}: this version reads {FORMAT}"
        )
    return record


def check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """ValueError unless `what` has exactly the parameters of the model."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        lists = {"lack": missing, "have unknown": unknown}
        parts = [f"{verb} {', '.join(names[:4])} ({len(names)})" for verb, names in lists.items() if names]
        raise ValueError(f"the names in {what} are not the model's: they {' and '.join(parts)}")
