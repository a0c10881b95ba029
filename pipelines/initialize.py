"""`self-forcing initialize`: the initial student, by regression on the teacher's ODE trajectories.

Ray Data integrates the probability-flow ODE of the guided teacher and writes trajectories as Parquet; then the student, under the block-causal
mask of its own rollout, learns to predict where each noisy chunk ends (CausVid, section 4.2). The trajectories' timesteps and the student's
few-step list come from one schedule.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor, nn

from infra import storage
from model.noise import SampleNoise, integer
from model.objectives.regression import regression_terms, trajectory_inputs
from model.schedule import FlowSchedule
from model.score import guide
from model.transformer import WanTransformer
from orchestrator.config import RunConfig
from pipelines.pretrain import export_model
from pipelines.training import Task
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, tensor_fields
from workers.engine import TrainEngine
from workers.model_directory import ModelCard, ModelDirectory

ODE_BATCH = 32


def ode_grid(config: RunConfig) -> list[float]:
    """Unwarped timesteps of the ODE: evenly spaced, and every step of the student among them, then 0."""
    even = torch.linspace(1000, 0, config.initialize.ode_steps + 1).tolist()
    return sorted({*map(float, config.rollout.steps), *(round(step, 6) for step in even)}, reverse=True)


@torch.no_grad()
def integrate(
    model: nn.Module,
    x: Tensor,
    *,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
    shift: float,
    grid: list[float],
) -> list[Tensor]:
    """Euler's method along the guided velocity from noise `x` [B, F, C, H, W]; the video at each timestep of `grid`."""
    schedule = FlowSchedule(shift)
    timesteps = schedule.few_steps(grid)
    # The end of the path is clean, while the table's smallest sigma is not zero.
    sigmas = [*schedule.sigma(torch.tensor(timesteps[:-1])).tolist(), 0.0]
    path = [x]
    for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        t = torch.full((2 * len(x),), timestep, device=x.device)
        both = model(torch.cat([x, x]), t, torch.cat([cond, uncond.expand_as(cond)])).float()
        x = x + (following - sigma) * guide(both[: len(x)], both[len(x) :], guidance)
        path.append(x)
    return path


class OdeSampler:
    """A Ray Data actor that turns sample indices into trajectories."""

    def __init__(self, config: RunConfig, threads: int):
        torch.set_num_threads(threads)
        self.config = config
        source = ModelDirectory(config.initialize.teacher)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = source.transformer(self.device)
        self.text = source.text_encoder(self.device)
        self.prompts = ParquetDataset(config.data.train, ["prompt"])
        self.grid = ode_grid(config)
        self.kept = [self.grid.index(float(step)) for step in config.rollout.steps] + [len(self.grid) - 1]

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        samples = [int(i) for i in batch["id"]]
        seed, settings = self.config.seed, self.config.initialize
        prompts = [self.prompts.batch(i, 1, seed)[0]["prompt"] for i in samples]
        noise = SampleNoise([(seed, "ode", i) for i in samples], self.device).draw(
            (len(samples), *self.config.video.shape), 0, 0
        )
        path = integrate(
            self.model,
            noise,
            cond=self.text.encode(prompts),
            uncond=self.text.encode([self.config.distill.roles.teacher.negative_prompt]),
            guidance=settings.guidance,
            shift=self.config.rollout.shift,
            grid=self.grid,
        )
        trajectories = torch.stack([path[i] for i in self.kept], dim=1).cpu()
        rows = [
            {"sample": i, "prompt": prompt, **encode_tensor("trajectory", trajectory)}
            for i, prompt, trajectory in zip(samples, prompts, trajectories, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}


def write_pairs(config: RunConfig) -> None:
    """Write the trajectories, whole or not at all; those that are there already are kept if they were made with the same settings."""
    settings = config.initialize
    made_with = {
        "pairs": settings.pairs,
        "grid": ode_grid(config),
        "guidance": settings.guidance,
        "shift": config.rollout.shift,
        "seed": config.seed,
        "steps": list(config.rollout.steps),
        "teacher": storage.read_metadata(settings.teacher) | {"path": settings.teacher},
    }
    if storage.is_complete(settings.pairs_path):
        if storage.read_metadata(settings.pairs_path) == made_with:
            return
        raise ValueError(
            f"{settings.pairs_path} holds ODE pairs made with other settings; delete it or choose another initialize.pairs_path."
        )
    staging = storage.begin(settings.pairs_path)
    schema = dataset_schema(
        [pa.field("sample", pa.int64()), pa.field("prompt", pa.string()), *tensor_fields("trajectory")],
        kind="ode_pairs",
        provenance=made_with,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Rows in order, so that the data set (and the order in which training reads it) is the same every time.
    context.execution_options.preserve_order = True
    role = settings.role
    with storage.writing(staging) as directory:
        (
            ray.data.range(settings.pairs, override_num_blocks=max(1, settings.pairs // (4 * ODE_BATCH)))
            .map_batches(
                OdeSampler,
                fn_constructor_args=(config, role.threads),
                batch_size=ODE_BATCH,
                num_cpus=role.cpus,
                num_gpus=role.gpus,
                compute=ray.data.ActorPoolStrategy(size=settings.samplers),
            )
            .write_parquet(str(directory), schema=schema)
        )
    storage.publish(staging, settings.pairs_path, made_with)


@dataclass
class Initialize(Task):
    """Causal regression on ODE pairs."""

    config: RunConfig
    lineage: Mapping[str, str]
    compile = False

    def source(self) -> ModelDirectory:
        return ModelDirectory(self.config.initialize.teacher)

    def weights(self) -> ModelDirectory:
        return self.source()

    def build(self) -> nn.Module:
        checkpointing = self.config.initialize.role.activation_checkpointing
        return WanTransformer(self.config.student, activation_checkpointing=checkpointing)

    def open(self, device: torch.device) -> None:
        self.device = device
        self.data = ParquetDataset(self.config.initialize.pairs_path, ["prompt", "trajectory"])
        self.text = self.source().text_encoder(device)
        schedule = FlowSchedule(self.config.rollout.shift)
        self.schedule = schedule
        self.steps = torch.tensor([*schedule.few_steps(self.config.rollout.steps), 0.0], device=device)

    def _index(self, update: int, samples: range) -> Tensor:
        """Which step of its trajectory each frame is shown at, the same within a chunk: [B, F]."""
        chunk, seed = self.config.rollout.chunk, self.config.seed
        chunks = range(self.config.video.frames // chunk)
        index = [[integer(len(self.steps), seed, update, "index", i, c) for c in chunks] for i in samples]
        return torch.tensor(index, device=self.device).repeat_interleave(chunk, dim=1)

    def loss(self, module: Callable[..., Tensor], update: int, samples: range, batch: int) -> Tensor:
        rows = self.data.batch(update * batch + samples.start, len(samples), self.config.seed)
        trajectory = torch.stack([row["trajectory"] for row in rows]).to(self.device)
        noisy, timestep = trajectory_inputs(trajectory, self.steps, self._index(update, samples))
        rollout = self.config.rollout
        context = self.text.encode([row["prompt"] for row in rows])
        velocity = module(noisy, timestep, context, chunk=rollout.chunk, window=rollout.context_window())
        total, count = regression_terms(
            self.schedule.x0(velocity, noisy, timestep), trajectory[:, -1], timestep
        )
        # Noisy values of the whole batch, which every rank can count for itself, so that means of means stay the pooled mean.
        noisy_frames = (self._index(update, range(batch)) < len(self.steps) - 1).sum()
        values = count / max(1, int((timestep != 0).sum())) * noisy_frames
        return total / values * (batch / len(samples))

    def export(self, engine: TrainEngine, path: str) -> None:
        source = self.source()
        card = ModelCard(
            "student",
            self.config.student,
            self.config.video,
            source.card.text,
            rollout=self.config.rollout,
            shift=self.config.rollout.shift,
            lineage=self.lineage,
            recipe=self.config.portable(),
        )
        export_model(engine, path, card, source.text_weights())


def check(config: RunConfig) -> ModelDirectory:
    """The teacher that the student starts from; ValueError where it does not fit."""
    source = ModelDirectory(config.initialize.teacher)
    if source.card.transformer != config.student:
        raise ValueError(
            f"the model at {config.initialize.teacher} has other sizes than `student`; "
            "initialize.teacher must be a model of the student's size."
        )
    if source.card.video.shape != config.video.shape:
        raise ValueError(
            f"the model at {config.initialize.teacher} makes latents of {source.card.video.shape}, `video` says {config.video.shape}."
        )
    return source
