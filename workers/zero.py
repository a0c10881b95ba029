"""What `engine` needs of DeepSpeed ZeRO (Rajbhandari et al. 2020), and the only module that knows DeepSpeed.

Whatever the stage, fp32 master weights and Adam moments are addressed as *this rank's slice of each flattened
parameter*, so that one code path can gather, save, average and export them.
"""

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.engine_config import EngineConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def deepspeed() -> Any:
    """DeepSpeed, imported on first use: it takes a while, and reads the accelerator from the environment."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _hidden("mlflow"):
        import deepspeed

    return deepspeed


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Inside the block a package that was not imported yet cannot be. DeepSpeed imports MLflow where it can,
    for a tuner that we have no use for, and takes four times as long."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def device() -> torch.device:
    """Where this process computes: on the first GPU that it sees, or that `init_process_group` was given."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def init_process_group(
    *, rank: int, world_size: int, master_addr: str, master_port: int, timeout_s: float, gpu: int = 0
) -> None:
    """Join this process to its worker group (NCCL with a GPU, gloo without): once per process, all ranks at
    once.

    `gpu` is which of the GPUs that this process sees is its own, where it sees any. An actor of ours sees
    one; a rank of Ray Train sees those of all ranks on its node. A collective that waits longer than
    `timeout_s` seconds fails instead of hanging.
    """
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": master_addr, "MASTER_PORT": master_port}
    # DeepSpeed takes the GPU of this number.
    os.environ.update({name: str(value) for name, value in place.items()}, LOCAL_RANK=str(gpu))
    # DeepSpeed calls collectives by names that PyTorch is about to retire, which is not our user's concern.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    else:
        # No compiled extensions: otherwise a first start on a CPU spends tens of seconds compiling a
        # shared-memory backend, which only DeepSpeed's inference calls use.
        deepspeed().ops.__compatible_ops__ = {}
    deepspeed().init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        rank=rank,
        world_size=world_size,
    )


def settings(config: EngineConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a model in training."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": 50_000_000}
    if config.offload:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if config.zero_stage == 3 else {})
    adam = {
        "lr": config.learning_rate,
        "betas": list(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        # PyTorch's AdamW needs no compiler; its fused kernel is the fast one on host memory.
        "torch_adam": True,
        "fused": config.offload,
    }
    chosen: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero,
    }
    if config.dtype == "bf16":
        chosen |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
        if config.zero_stage > 0:
            chosen["data_types"] = {"grad_accum_dtype": "fp32"}
    return chosen


def build_module(build: Callable[[], nn.Module], chosen: dict[str, Any]) -> nn.Module:
    """Call `build`, at stage 3 with each submodule sharded as soon as it is constructed."""
    sharded = chosen["zero_optimization"]["stage"] == 3
    # Built in fp32, since DeepSpeed would make the model's buffers bf16 as well.
    fp32 = {key: value for key, value in chosen.items() if key != "bf16"}
    init = deepspeed().zero.Init(config_dict_or_path=fp32) if sharded else None
    with init or contextlib.nullcontext():
        module = build()
    if sharded and "bf16" in chosen:
        parameter: Any
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
            parameter.ds_tensor.data = parameter.ds_tensor.data.bfloat16()
    extra = set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if extra:
        raise ValueError(f"the model's buffer {min(extra)} would have to be saved: make it non-persistent")
    return module


def without_memory(build: Callable[[], nn.Module]) -> nn.Module | None:
    """The module without memory; None where it has buffers, which are computed and nowhere read."""
    with torch.device("meta"):
        module = build()
    return module if next(module.buffers(), None) is None else None


def unwritten(build: Callable[[], nn.Module], place: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module on a device, for weights that are read later: none is drawn, and none is ever in host memory
    or in a wider type on the way."""
    module = without_memory(build)
    if module is None:
        return build()
    module = module.to(dtype).to_empty(device=place)
    for parameter in module.parameters():
        parameter.data.zero_()  # so that nothing that is left there is ever computed with
    return module


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def assign(parameter: Any, full: Tensor) -> None:
    """Write a whole parameter into what this rank holds of it: everything, or at stage 3 its shard."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(full)
        return
    shard = parameter.ds_tensor.data.view(-1)
    part = full.view(-1)[dist.get_rank() * shard.numel() :][: shard.numel()]
    shard[: part.numel()].copy_(part)


@dataclass(frozen=True)
class Slice:
    """This rank's part `[start, start + len(value))` of one flattened parameter."""

    start: int
    value: Tensor
    """Live view of the fp32 master weights (of the weights themselves if the parameter is frozen)."""
    owner: Tensor
    """The tensor that holds `value` at `offset`: the one AdamW steps if the parameter is trained."""
    offset: int
    trained: bool


class ZeroModel:
    """One model and its AdamW under DeepSpeed."""

    def __init__(self, build: Callable[[], nn.Module], config: EngineConfig) -> None:
        self.stage, self.offload = config.zero_stage, config.offload
        chosen = settings(config)
        module = build_module(build, chosen)
        self.parameters = dict(module.named_parameters())
        trainable = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        # Memory figures are printed here that no setting turns off; DeepSpeed's log goes elsewhere.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed().initialize(model=module, model_parameters=trainable, config=chosen)
        self.module: nn.Module = self.engine.module
        self.adam: torch.optim.Optimizer = self.engine.basic_optimizer
        # Stage 0 in fp32: DeepSpeed wraps nothing around AdamW, so nothing measures or skips a step.
        self.plain = self.adam is self.engine.optimizer
        owners = self._whole_owners() if self.stage == 0 else {}
        self.slices = {name: self._locate(parameter, owners) for name, parameter in self.parameters.items()}

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the block the weights are whole on every rank, which all enter at once. What still refers to
        one afterwards keeps it."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed().zero.GatheredParameters(list(self.parameters.values()))

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """Add a micro-batch's gradient, the `first` or `last` of its update; over ranks, reduced by the
        last."""
        if first:
            self._forget_gradients()
        optimizer = self.engine.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer) and self.stage > 0:
            # DeepSpeed does this in its own forward, which calls through `module` bypass. Without it, stage 3
            # overwrites gradients instead of accumulating them, and stage 1 in bf16 adds each one twice.
            optimizer.clear_backward_seen_flag()
            optimizer.backward_prologue()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> float:
        """Update the weights; the gradient norm before clipping, or inf if it was not finite and nothing
        changed."""
        norm = None
        if self.plain:
            grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return math.inf
        self.engine.step()
        if not self.engine.was_step_applied():
            return math.inf
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def gradients(self) -> dict[str, Tensor]:
        """Whole fp32 gradients by name, after the last backward of an update."""
        from deepspeed.utils import safe_get_full_grad

        trainable = {
            name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad
        }
        return {name: safe_get_full_grad(parameter).float().clone() for name, parameter in trainable.items()}

    def moment(self, piece: Slice, key: str) -> Tensor:
        """Live view of Adam's moment `key` under a slice."""
        return self.adam.state[piece.owner][key].view(-1)[piece.offset : piece.offset + piece.value.numel()]

    def gather(self, name: str, value: Tensor) -> Tensor:
        """The whole fp32 parameter from `value`, which every rank passes for its own slice (collective)."""
        shape, start = shape_of(self.parameters[name]), self.slices[name].start
        full = torch.zeros(shape.numel(), dtype=torch.float32, device=device())
        full[start : start + value.numel()] = value.to(full.device)
        dist.all_reduce(full)
        return full.view(shape)

    @torch.no_grad()
    def begin_writing(self) -> None:
        """To call before `write`: at stage 3, drops whole weights still held, so that shards are enough."""
        if self.stage == 3:
            self.engine.optimizer.empty_partition_cache()

    @torch.no_grad()
    def write(self, name: str, full: Tensor) -> None:
        """Make `full` [the parameter's shape] a parameter's value, in its master weights and in the model."""
        piece = self.slices[name]
        if self.stage == 0:
            piece.owner.copy_(full)
        else:
            piece.value.copy_(full.view(-1)[piece.start : piece.start + piece.value.numel()])
        assign(self.parameters[name], full)

    def write_moments(self, name: str, moments: dict[str, Tensor], step: int) -> None:
        """Set this rank's slices of Adam's moments after `step` steps (collective)."""
        piece = self.slices[name]
        if not self.adam.state[piece.owner]:
            where = piece.owner.device if self.offload else "cpu"
            count = torch.tensor(float(step), dtype=torch.float32, device=where)
            self.adam.state[piece.owner] = {"step": count} | {
                key: torch.zeros_like(piece.owner) for key in moments
            }
        for key, value in moments.items():
            if self.stage == 0:
                self.adam.state[piece.owner][key].copy_(self.gather(name, value))
            else:
                self.moment(piece, key).copy_(value)

    def _whole_owners(self) -> dict[nn.Parameter, Tensor]:
        """At stage 0, the whole tensor AdamW steps for each parameter: an fp32 copy, or in fp32 the
        parameter."""
        optimizer = self.engine.optimizer
        if self.plain:
            return {parameter: parameter for group in optimizer.param_groups for parameter in group["params"]}
        owners = {
            low: high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        # DeepSpeed has made one AdamW step with a zero gradient to allocate the moments: undo its count and
        # decay.
        self.adam.state.clear()
        for low, high in owners.items():
            high.data.copy_(low)
        return owners

    def _locate(self, parameter: Any, owners: dict[nn.Parameter, Tensor]) -> Slice:
        """This rank's slice of a parameter, empty if it has none."""
        rank, optimizer, total = dist.get_rank(), self.engine.optimizer, shape_of(parameter).numel()
        trained, sharded = parameter.requires_grad, self.stage == 3
        size = parameter.ds_tensor.numel() if sharded else -(-total // dist.get_world_size())
        start = min(rank * size, total)
        count, offset = min(size, total - start), 0 if sharded else start
        if sharded and trained:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            owner = optimizer.fp32_partitioned_groups_flat[group]
        elif sharded:
            owner = parameter.ds_tensor
        elif not trained or self.stage == 0:
            owner = owners.get(parameter, parameter)
        else:
            fragment = parameter._hp_mapping
            owner, start, count, offset = self.adam.param_groups[0]["params"][0], 0, 0, 0
            if fragment is not None:
                start, offset = fragment.lp_fragment_address.start, fragment.hp_fragment_address.start
                count = fragment.hp_fragment_address.numel
        return Slice(start, owner.data.view(-1)[offset : offset + count], owner, offset, trained)

    def _forget_gradients(self) -> None:
        """Zero what DeepSpeed keeps of the last update: what this update does not reach would get it
        again."""
        optimizer, kept = self.engine.optimizer, []
        if self.stage == 3:
            kept.append(optimizer.grad_partitions_flat_buffer)
        if self.offload:
            kept += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
            owners = {
                id(piece.owner): piece.owner for piece in self.slices.values() if piece.owner is not None
            }
            kept += [owner.grad for owner in owners.values() if owner.grad is not None]
        for buffer in kept:
            buffer.zero_()
