"""What actors have in common: how they answer, and what every rank of a role is.

A verb is a method `verb(plan, batch) → (Stats, Batch)`. The plan holds all that is random or variable (None
where nothing is), and `Stats` are the only thing that the coordinator reads.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from infra import storage
from infra.storage.local import started
from workers.batch import Batch, Read
from workers.engine import TrainEngine, free_port, init_process_group
from workers.engine_state import SavedState, Snapshot
from workers.failure import classified
from workers.prompts import TrainingData

Stats = dict[str, float]
"""What a verb measured: `seconds` among it, on a GPU `memory` (the most GiB that tensors took there), and
where an optimizer step was due `steps`, those that were made in all."""


class Worker:
    """An actor that answers verbs."""

    makes: ClassVar[tuple[str, ...]] = ()
    """Predictions of a noisy video that it can be asked for; those of one of the data are called `data_…`."""

    data: TrainingData
    """What it reads of the data itself, of those that are asked to."""

    _doing: tuple[str, float] | None = None  # a call, and when it began

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def process(self) -> tuple[str, int, int]:
        """The node that it runs on, its process there, and when that was started (see `started`)."""
        import ray  # only in an actor, so that what a scorer makes is known without

        return ray.get_runtime_context().get_node_id(), os.getpid(), started(os.getpid())

    def pulse(self) -> tuple[str, float]:
        """Its sign of life, in a thread of its own: which call it is at, and for how many seconds."""
        verb, since = self._doing or ("", time.monotonic())
        return verb, time.monotonic() - since

    @contextmanager
    def _at(self, verb: str) -> Iterator[None]:
        """At a call, whose failure is classified here."""
        self._doing = verb, time.monotonic()
        try:
            with classified():
                yield
        finally:
            self._doing = None

    def call(self, method: str, *arguments: Any) -> Any:
        """The worker's half of `WorkerGroup.broadcast`."""
        with self._at(method):
            return getattr(self, method)(*arguments)

    def answer(
        self,
        verb: str,
        plan: Any,
        samples: list[int],
        columns: Sequence[str],
        makes: Sequence[str],
        *tensors: Tensor | Read,
    ) -> Any:
        """The worker's half of `WorkerGroup.scatter`: the verb's `Stats`, then what it made of `makes`,
        sample by sample.

        `tensors` are one a sample, column after column of `columns`; what is to be read is read here.
        Without `makes` the `Stats` come bare, as Ray wants an answer of one value.
        """
        with self._at(verb):
            began, gpu = time.perf_counter(), self.device.type == "cuda"
            if gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            batch = Batch.stacked(samples, columns, self._whole(tensors), self.device)
            stats, made = getattr(self, verb)(plan, batch)
            tensors_made = made.unstacked(makes)
            stats["seconds"] = time.perf_counter() - began
            if gpu:
                stats["memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            return (stats, *tensors_made) if makes else stats

    def _whole(self, tensors: Sequence[Tensor | Read]) -> list[Tensor]:
        """The tensors, with what is to be read in its place."""
        wanted = [each for each in tensors if isinstance(each, Read)]
        read = iter(self.data.read(wanted) if wanted else ())
        return [next(read) if isinstance(each, Read) else each for each in tensors]


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


@cache
def _writer() -> ThreadPoolExecutor:
    """The thread of this process that writes checkpoints."""
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


class TrainedRank(Rank):
    """One rank of a model in training."""

    engine: TrainEngine
    _kept: Snapshot | None
    _writing: "Future[None]"

    @abstractmethod
    def forget(self) -> None:
        """Drop the graph that is alive, if any."""

    def snapshot(self) -> None:
        """Copy this rank's part of the training state to host memory; on all ranks at once."""
        self._kept = self.engine.snapshot()

    def write(self, staging: str, role: str) -> None:
        """Begin to write what `snapshot` kept, below `role` in a checkpoint's staging location.

        That goes on beside other calls, on a thread of its own; `written` says when it is done.
        """
        kept, self._kept = self._kept, None
        assert kept is not None, "snapshot comes first"

        def write() -> None:
            with storage.writing(staging) as directory:
                kept.write(directory / role)

        self._writing = _writer().submit(write)

    def written(self) -> bool:
        """Whether what `write` began is written; StorageError where it cannot be."""
        if not self._writing.done():
            return False
        self._writing.result()
        return True

    def hold(self) -> dict[str, Any]:
        """This rank's part of the training state, for Ray's object store; on all ranks at once."""
        return self.engine.snapshot().arrays()

    def receive(self, held: dict[str, Any]) -> None:
        """Have what `hold` gave of this rank here, for `take`."""
        self._received = held

    def take(self) -> None:
        """Return to what was received; on all ranks at once."""
        self.forget()
        self.engine.restore(SavedState.of_arrays(self._received))
        del self._received

    def load(self, checkpoint: str, role: str) -> None:
        """Read what `write` wrote; what was under way is forgotten."""
        self.forget()
        with storage.reading(checkpoint) as directory:
            self.engine.load(directory / role)
