"""Randomness that depends on what is drawn, never on who draws it.

Every number is drawn from a generator seeded by its full name (run seed, update, purpose, sample index, …).
Results therefore do not change with the number of ranks, the device, a retry, or a resume, and nothing about
randomness has to be saved.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`, of which PyTorch's CPU generator uses 32 bits."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def integer(high: int, *key: int | str) -> int:
    """One uniform integer in [0, high), drawn for `key`."""
    return int(torch.randint(high, (), generator=generator(*key)))


def permutation(count: int, *key: int | str) -> list[int]:
    """The integers in [0, count) in an order drawn for `key`."""
    return torch.randperm(count, generator=generator(*key)).tolist()


def stratified(index: int, high: int, *key: int | str) -> int:
    """Element `index` of a sequence of integers in [0, high), drawn for `key`, that takes every one of them
    once before it takes one again.

    Each element alone is uniform. It depends on `key` and `index` only, so whoever asks gets the same.
    """
    return permutation(high, *key, index // high)[index % high]


class NoiseSource(Protocol):
    """Where a rollout takes its Gaussian draws from."""

    def draw(self, shape: Sequence[int], chunk: int, step: int) -> Tensor:
        """Standard normal noise [B, f, C, H, W]; step 0 is a chunk's first, step k its k-th re-noising."""
        ...


class SampleNoise:
    """Independent draws for each sample of a batch, named by that sample's key."""

    def __init__(
        self, keys: Sequence[Key], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.keys = list(keys)
        self.device = device
        self.dtype = dtype

    def draw(self, shape: Sequence[int], chunk: int, step: int) -> Tensor:
        if shape[0] != len(self.keys):
            raise ValueError(f"noise for {len(self.keys)} samples was asked for {shape[0]}.")
        rows = [torch.randn(tuple(shape[1:]), generator=generator(*key, chunk, step)) for key in self.keys]
        return torch.stack(rows).to(self.device, self.dtype)
