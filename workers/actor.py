"""What actors have in common: how they answer, and what every rank of a role is.

A verb is a method `verb(plan, batch) → (Stats, Batch)`. The plan holds all that is random or variable (None
where nothing is), and `Stats` are the only thing that the coordinator reads.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from infra import storage
from workers.batch import Batch
from workers.engine import TrainEngine, free_port, init_process_group

Stats = dict[str, float]
"""What a verb measured, `seconds` among it, and on a GPU `memory`: the most GiB that tensors took there."""


class Worker:
    """An actor that answers verbs."""

    makes: ClassVar[tuple[str, ...]] = ()
    """Predictions of a noisy video that it can be asked for; those of one of the data are called `data_…`."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def node(self) -> str:
        """Id of the node that it runs on."""
        import ray  # only in an actor, so that what a scorer makes is known without

        return ray.get_runtime_context().get_node_id()

    def answer(
        self,
        verb: str,
        plan: Any,
        samples: list[int],
        columns: Sequence[str],
        makes: Sequence[str],
        *tensors: Tensor,
    ) -> Any:
        """The worker's half of `WorkerGroup.scatter`: the verb's `Stats`, then what it made of `makes`,
        sample by sample.

        `tensors` are one a sample, column after column of `columns`. Without `makes` the `Stats` come bare,
        as Ray wants an answer of one value.
        """
        began, gpu = time.perf_counter(), self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        stats, made = getattr(self, verb)(plan, Batch.stacked(samples, columns, tensors, self.device))
        tensors_made = made.unstacked(makes)
        stats["seconds"] = time.perf_counter() - began
        if gpu:
            stats["memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return (stats, *tensors_made) if makes else stats


class Rank(Worker, ABC):
    """One rank of a role: a process with its own devices."""

    engine: Any  # a FrozenEngine or a TrainEngine

    def __init__(self, *, rank: int, ranks: int, threads: int):
        torch.set_num_threads(threads)
        self.rank = rank
        self.ranks = ranks

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def address(self) -> tuple[str, int]:
        """Where this process can be met, for rank 0 to lead its group."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def start(self, address: str, port: int, timeout_s: float) -> None:
        """Join the group and build the model; on all ranks at once."""
        init_process_group(
            rank=self.rank, world_size=self.ranks, master_addr=address, master_port=port, timeout_s=timeout_s
        )
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the model; its process group is there."""


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
