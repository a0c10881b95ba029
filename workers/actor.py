"""What every rank of a role has in common: its process group, its graphs in flight, and its clock.

A verb takes and returns tensors one per sample, so groups of different sizes re-shard by reference; its first result is always a small
`Stats`, the only thing that the coordinator reads.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any

import ray
import torch
from torch import Tensor

from infra import storage
from workers.engine import TrainEngine, free_port, init_process_group

Stats = dict[str, float]
"""What a verb measured, `seconds` among it."""


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the seconds that a verb took to the `Stats` that it returns alone or first."""

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        answer = function(*args, **kwargs)
        stats = answer[0] if isinstance(answer, tuple) else answer
        stats["seconds"] = time.perf_counter() - began
        return answer

    return timed


class Rank(ABC):
    """One rank of a role: a process with its own devices."""

    engine: Any  # a FrozenEngine or a TrainEngine

    def __init__(self, *, rank: int, ranks: int, threads: int):
        torch.set_num_threads(threads)
        self.rank = rank
        self.ranks = ranks

    def address(self) -> tuple[str, int]:
        """Where this process can be met, for rank 0 to lead its group."""
        return ray.util.get_node_ip_address(), free_port()

    def node(self) -> str:
        """Id of the node that this rank runs on."""
        return ray.get_runtime_context().get_node_id()

    def start(self, address: str, port: int, timeout_s: float) -> None:
        """Join the group and build the model; on all ranks at once."""
        init_process_group(
            rank=self.rank, world_size=self.ranks, master_addr=address, master_port=port, timeout_s=timeout_s
        )
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the model; its process group is there."""

    def columns(self, samples: list[int], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Batches [B, …], one for each column of `tensors`, which has one tensor a sample.

        What comes out of the object store is read-only until it is copied.
        """
        count = len(samples)
        starts = range(0, len(tensors), count)
        return [torch.stack(tensors[first : first + count]).to(self.engine.device) for first in starts]


class TrainedRank(Rank):
    """One rank of a model in training."""

    engine: TrainEngine

    def save(self, staging: str, role: str) -> None:
        """Write this rank's part of the training state below `role` in a checkpoint's staging location."""
        with storage.writing(staging) as directory:
            self.engine.save(directory / role)

    def load(self, checkpoint: str, role: str) -> None:
        """Read what `save` wrote."""
        with storage.reading(checkpoint) as directory:
            self.engine.load(directory / role)


def samples_out(tensor: Tensor) -> list[Tensor]:
    """A batch [B, …] as B tensors of their own, on the CPU: a view would carry the whole batch into the object store."""
    return [sample.clone() for sample in tensor.detach().cpu()]
