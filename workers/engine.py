"""One rank of a model, in training (`TrainEngine`: student, critic) or answering (`FrozenEngine`: teacher).

Both expose `.module`, the `nn.Module` to call. A score is pulled back to its input with
`torch.autograd.grad`, which leaves the weights' gradients untouched; only `TrainEngine.backward` adds to
those. Knows nothing of Ray, of losses or of where checkpoints belong; DeepSpeed is behind `workers.zero`.
"""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.backbone import WeightSource
from workers import zero
from workers.engine_config import EngineConfig
from workers.engine_state import FORMAT, SavedState, Snapshot, check_names, path_of
from workers.zero import init_process_group

__all__ = [
    "EngineConfig",
    "FrozenEngine",
    "StepResult",
    "TrainEngine",
    "WeightSource",
    "free_port",
    "init_process_group",
]


@dataclass(frozen=True)
class StepResult:
    """What `TrainEngine.step` did."""

    grad_norm: float
    """Gradient norm before clipping, the same on all ranks: inf if not finite, 0 if no step was due."""
    stepped: bool  # whether the weights were updated
    learning_rate: float = 0.0
    """Of the step that was due; 0 if none was."""


def free_port() -> int:
    """A TCP port that is free here now; call it on rank 0's node right before `init_process_group`."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def finite(loss: Tensor) -> Tensor:
    """1 for a loss that is finite, and NaN for one that isn't, whose gradient may be: nobody waits for it."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


class TrainEngine:
    """This rank of a model in training. All ranks construct it, and call its methods, in the same order.

    `module` is what to call, `device` and `dtype` what its inputs should have, `version` the optimizer steps
    made.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: EngineConfig,
        *,
        weights: WeightSource | None = None,
    ) -> None:
        """Build the model, shard it and load `weights`, tensor by tensor.

        At stage 3 no rank ever holds the whole model: each submodule is sharded as soon as `build` has
        constructed it. `weights` must name exactly the model's parameters; all ranks pass it and rank 0 reads
        the tensors; none keeps rank 0's initialisation. Parameters that `build` froze are not trained: they
        have no gradient, moments or average, are in no checkpoint, and come from `weights` again.
        `ValueError`, on every rank, if names or shapes do not fit.
        """
        self.config = config
        self.device = zero.device()
        self.dtype = zero.DTYPES[config.dtype]
        self.version = 0
        self._pending = 0
        if weights is not None and config.zero_stage < 3:
            build = partial(zero.unwritten, build, self.device, self.dtype)
        self._zero = zero.ZeroModel(build, config)
        self.module = self._zero.module
        if weights is not None:
            self._zero.begin_writing()
            for name, full in _stream(weights, self._zero.parameters, self.device, shared=True):
                self._zero.write(name, full)
        self._ema: dict[str, Tensor] = {}
        if config.ema_decay is not None:
            self._ema = {name: piece.value.clone() for name, piece in self._trained.items()}

    @property
    def _trained(self) -> dict[str, zero.Slice]:
        return {name: piece for name, piece in self._zero.slices.items() if piece.trained}

    def whole(self) -> AbstractContextManager[Any]:
        """Inside the block the weights are whole on every rank, which all enter at once. What still refers to
        one afterwards keeps it."""
        return self._zero.whole()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar `loss`, the mean over this rank's samples, once per micro-batch.

        The mean over ranks and accumulation is taken here, and nowhere else. One that is not finite makes the
        whole update's gradient so, which `step` drops on every rank. `RuntimeError` if a step is due first.
        """
        if self._pending == self.config.accumulation:
            raise RuntimeError(
                f"backward was called {self._pending} times, as accumulation says: call step first"
            )
        self._pending += 1
        self._zero.backward(
            loss * finite(loss), first=self._pending == 1, last=self._pending == self.config.accumulation
        )

    def trained_values(self) -> list[tuple[Tensor, Tensor | None]]:
        """This rank's part of each trained parameter in fp32, as it is in memory, and its average if there is
        one."""
        return [(piece.value, self._ema.get(name)) for name, piece in self._trained.items()]

    def step(self) -> StepResult:
        """Update the weights and the EMA if `accumulation` backward calls were made, else do nothing.

        So it may be called after every backward, or once after the last. A gradient that is not finite is
        dropped and changes nothing: `grad_norm` is then inf and `stepped` false.
        """
        if self._pending < self.config.accumulation:
            return StepResult(grad_norm=0.0, stepped=False)
        self._pending = 0
        rate = self.config.schedule.rate(self.config.learning_rate, self.version)
        for group in self._zero.adam.param_groups:
            group["lr"] = rate
        grad_norm = self._zero.step()
        if not math.isfinite(grad_norm):
            return StepResult(grad_norm=math.inf, stepped=False, learning_rate=rate)
        self.version += 1
        if self.config.ema_decay is not None:
            weight = 1.0 - self.config.ema_decay if self.version > self.config.ema_start else 1.0
            for name, average in self._ema.items():
                average.lerp_(self._zero.slices[name].value, weight)
        return StepResult(grad_norm=grad_norm, stepped=True, learning_rate=rate)

    def gradients(self) -> dict[str, Tensor]:
        """Whole fp32 gradients by name, between the last backward of an update and its step; for tests."""
        if self._pending != self.config.accumulation:
            raise RuntimeError("gradients exist between the last backward of an update and its step")
        return self._zero.gradients()

    def snapshot(self) -> "Snapshot":
        """This rank's slices (weights, moments, EMA) and the version, copied to host memory; collective.

        `FloatingPointError`, on every rank, if some rank's numbers are not finite.
        """
        if self._pending:
            raise RuntimeError("a snapshot was asked for between a backward and its step")
        entries: dict[str, dict[str, Any]] = {}
        for name, piece in self._trained.items():
            entry = {"start": piece.start, "value": _copy(piece.value)}
            if self.version > 0:
                entry |= {key: _copy(self._zero.moment(piece, key)) for key in zero.MOMENTS}
            if name in self._ema:
                entry["ema"] = _copy(self._ema[name])
            entries[name] = entry
        _check_finite(entries)
        record = {
            "format": FORMAT,
            "stage": self.config.zero_stage,
            "version": self.version,
            "parameters": entries,
        }
        return Snapshot(record, path_of("").name)

    def load(self, directory: str | Path) -> None:
        """Continue from a `snapshot`: to the bit on as many ranks at one ZeRO stage, else to float accuracy.

        Files of other ranks are read where the slices lie otherwise. `ValueError` if files are missing,
        damaged or of another model.
        """
        self.restore(SavedState.read(directory, self.config.zero_stage))

    def restore(self, saved: SavedState) -> None:
        """The same from what was saved, wherever it is."""
        pieces = self._trained
        for name, piece in pieces.items():
            saved.check(name, zero.shape_of(self._zero.parameters[name]).numel(), piece)
            if name in self._ema and not saved.has(name, "ema"):
                raise ValueError(f"{saved} has no EMA: leave ema_decay out to resume from it")
        saved.check_names(pieces)
        self.version, self._pending = saved.version, 0
        self._zero.adam.state.clear()
        self._zero.begin_writing()
        for name, piece in pieces.items():
            self._zero.write(name, self._zero.gather(name, saved.part(name, "value", piece)))
            if self.version > 0:
                moments = {key: saved.part(name, key, piece) for key in zero.MOMENTS}
                self._zero.write_moments(name, moments, self.version)
            if name in self._ema:
                self._ema[name].copy_(saved.part(name, "ema", piece))
        dist.barrier()

    def export(
        self, write: Callable[[str, Tensor], None], *, ema: bool = False, trained_only: bool = False
    ) -> None:
        """Hand each whole parameter, in the model's order, to `write(name, fp32 CPU tensor)` on rank 0.

        Collective, with one parameter in memory at a time. With `ema`, averaged weights (frozen ones as they
        are). `FloatingPointError`, on every rank, where one is not finite.
        """
        if ema and self.config.ema_decay is None:
            raise ValueError("there are no averaged weights to export: set ema_decay")
        for name, piece in (self._trained if trained_only else self._zero.slices).items():
            full = self._zero.gather(name, self._ema.get(name, piece.value) if ema else piece.value)
            if not full.isfinite().all():
                raise FloatingPointError(f"the {'average' if ema else 'value'} of {name} is not finite")
            if dist.get_rank() == 0:
                write(name, full.cpu())


class FrozenEngine:
    """A model that answers and is never trained: replicated (`zero_stage` 0) or sharded over its group (3).

    `torch.autograd.grad(output, x, cotangent)` works through `module`. A replicated one needs no process
    group, so such a rank can restart alone; of a sharded one, all ranks make the same calls in the same
    order.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        weights: WeightSource,
        zero_stage: int = 0,
        dtype: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Build the model and load `weights`, which must name exactly its parameters.

        Sharded, rank 0 reads them for all; replicated, every rank reads them itself. Buffers keep their type.
        """
        if zero_stage not in (0, 3):
            raise ValueError(
                f"zero_stage of a frozen model is {zero_stage}: use 0 (replicated) or 3 (sharded)"
            )
        chosen = zero.settings(EngineConfig(learning_rate=0.0, zero_stage=zero_stage, dtype=dtype))
        del chosen["optimizer"]
        self.device = zero.device()
        self.dtype = zero.DTYPES[dtype]
        self.version = 0
        if zero_stage == 3:
            self.module = zero.build_module(build, chosen).eval().requires_grad_(False)
            parameters = dict(self.module.named_parameters())
            for name, full in _stream(weights, parameters, self.device, shared=True):
                zero.assign(parameters[name], full)
            self._engine, *_ = zero.deepspeed().initialize(model=self.module, config=chosen)
            return
        # Never whole in fp32: made without memory, and each weight put in as it is read.
        self.module = (zero.without_memory(build) or build().to(self.device)).eval()
        parameters = dict(self.module.named_parameters())
        streamed = _stream(weights, parameters, self.device, shared=False)
        state = {name: full.to(self.dtype) for name, full in streamed}
        self.module.load_state_dict(state, assign=True)
        self.module.requires_grad_(False)


def _stream(
    weights: WeightSource, parameters: dict[str, nn.Parameter], device: torch.device, *, shared: bool
) -> Iterator[tuple[str, Tensor]]:
    """Whole fp32 tensors of all parameters, one at a time; if `shared`, rank 0 reads for all."""
    check_names(parameters, weights.keys(), "the given weights")
    problem = None
    for name, parameter in parameters.items():
        full = torch.zeros(zero.shape_of(parameter), dtype=torch.float32, device=device)
        if not shared or dist.get_rank() == 0:
            tensor = weights.get(name)
            if tensor.shape == full.shape:
                full.copy_(tensor)
            else:
                found, needed = list(tensor.shape), list(full.shape)
                problem = f"the given weights have {name} of shape {found} and the model needs {needed}"
        if shared:
            dist.broadcast(full, 0)
        yield name, full
    if shared:
        # All ranks raise or none: one that stopped on the way would leave the others waiting.
        verdict = [problem]
        dist.broadcast_object_list(verdict, 0)
        problem = verdict[0]
    if problem:
        raise ValueError(problem)


def _check_finite(entries: dict[str, dict[str, Any]]) -> None:
    """`FloatingPointError`, on all ranks or none, naming the first tensor of some rank that is not finite."""
    bad = next(
        (
            f"{key} of {name}"
            for name, entry in entries.items()
            for key, tensor in entry.items()
            if isinstance(tensor, Tensor) and not tensor.isfinite().all()
        ),
        None,
    )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, bad)
    if any(found):
        raise FloatingPointError(f"the {next(filter(None, found))} is not finite")


def _copy(tensor: Tensor) -> Tensor:
    """A host copy without the rest of the buffer that a view would drag into the file."""
    return tensor.detach().to("cpu", copy=True)
