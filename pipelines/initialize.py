"""`self-forcing initialize`: the initial student, block-causal, from a model of its size.

Three ways lead to a few-step student: regression on ODE pairs of a bidirectional teacher (CausVid, arXiv 2412.07772, section 4.2), regression
on those of a causal teacher, and consistency distillation of a causal teacher. Two make a causal many-step model by flow matching on data,
under teacher forcing or diffusion forcing; such a model can be the causal teacher, or be looked at for what it is.
Everything has one schedule, the student's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from infra import storage
from infra.settings import part
from model.forcing import forced, per_chunk
from model.initialization.consistency import consistency_target
from model.initialization.regression import regression_terms, trajectory_inputs
from model.noise import SampleNoise, integer
from model.objectives.flow_matching import flow_matching_loss, timestep_weight
from model.rollout_plan import RolloutConfig
from model.sampler import euler_step, guided, ode_grid
from model.schedule import TIMESTEPS, FlowSchedule
from model.transformer import WanTransformer
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from orchestrator.handover import check_start
from orchestrator.single_model import Stage, Task, train
from pipelines.console import progress, say, summary
from pipelines.ode_pairs import write_pairs
from pipelines.pretrain import export_model
from pipelines.tracked import located, run_id_of, tracking
from workers import data_check
from workers.dataset import ParquetDataset
from workers.engine import FrozenEngine, TrainEngine
from workers.model_directory import ModelCard, ModelDirectory
from workers.prompts import LatentDataset, Prompts


@dataclass
class Initialize(Task):
    """What all ways to an initial student share."""

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
        self.prompts = Prompts(self.source(), device)
        self.schedule = FlowSchedule(self.config.rollout.shift)
        guide = self.config.distill.roles.teacher
        negative = self.prompts.negative(guide.negative_prompt, guide.negative_embedding)
        self.negative = negative.to(device)
        self.open_data()

    def open_data(self) -> None:
        """Open what this way learns from: real videos, unless it says otherwise."""
        data = self.config.data
        assert data.real is not None, "the config asks for real videos"
        self.data = LatentDataset(
            data.real, self.config.video, self.prompts.column, skip_damaged=data.skip_damaged
        )

    def real_videos(self, update: int, samples: range, batch: int) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, H, W] and the embeddings of their prompts."""
        latents, prompts = self.data.batch(update * batch + samples.start, len(samples), self.config.seed)
        return torch.stack(latents).to(self.device), torch.stack(self.prompts.embed(prompts)).to(self.device)

    def rollout(self) -> RolloutConfig:
        """How the finished model generates."""
        return self.config.rollout

    def guidance(self) -> float:
        """The guidance that it needs to generate."""
        return 0.0

    def export(self, engine: TrainEngine, path: str) -> None:
        source = self.source()
        card = ModelCard(
            "student",
            self.config.student,
            self.config.video,
            source.card.text,
            rollout=self.rollout(),
            guidance=self.guidance(),
            shift=self.config.rollout.shift,
            lineage=self.lineage,
            recipe=self.config.portable(),
        )
        export_model(engine, path, card, source.text_weights())


class Regression(Initialize):
    """Regression on ODE pairs, of a bidirectional or of a causal teacher."""

    def open_data(self) -> None:
        self.causal = self.config.initialize.method == "causal_ode"
        columns = [self.prompts.column, "trajectory", *(["clean"] if self.causal else [])]
        self.pairs = ParquetDataset(self.config.initialize.pairs_path, columns)
        steps = self.schedule.few_steps(self.config.rollout.every_step)
        # A causal teacher's student always has a clean past; another one meets it where the past is drawn at timestep 0.
        self.steps = torch.tensor([*steps, *([] if self.causal else [0.0])], device=self.device)

    def _index(self, update: int, samples: range) -> Tensor:
        """Which step of its trajectory each frame is shown at, the same within a chunk: [B, F]."""
        keys = [(self.config.seed, update, "index", i) for i in samples]
        return per_chunk(len(self.steps), self.config.rollout, self.config.video.frames, keys).to(self.device)

    def loss(self, module: Callable[..., Tensor], update: int, samples: range, batch: int) -> Tensor:
        rows = self.pairs.batch(update * batch + samples.start, len(samples), self.config.seed)
        trajectory = torch.stack([row["trajectory"] for row in rows]).to(self.device)
        clean = torch.stack([row["clean"] for row in rows]).to(self.device) if self.causal else None
        noisy, timestep = trajectory_inputs(trajectory, self.steps, self._index(update, samples))
        context = torch.stack(self.prompts.embed([row[self.prompts.column] for row in rows])).to(self.device)
        velocity = forced(module, self.config.rollout, noisy, timestep, context, clean)
        total, count = regression_terms(
            self.schedule.x0(velocity, noisy, timestep), trajectory[:, -1], timestep
        )
        # Noisy values of the whole batch, which every rank can count for itself, so that means of means stay the pooled mean.
        noisy_frames = (self.steps[self._index(update, range(batch))] != 0).sum()
        values = count / max(1, int((timestep != 0).sum())) * noisy_frames
        return total / values * (batch / len(samples))


class ForcedFlow(Initialize):
    """Autoregressive flow matching on data, under teacher forcing or diffusion forcing."""

    def loss(self, module: Callable[..., Tensor], update: int, samples: range, batch: int) -> Tensor:
        config, method = self.config, self.config.initialize.method
        data, context = self.real_videos(update, samples, batch)
        keys = [(config.seed, update, method, i) for i in samples]
        drop = [
            integer(1000, config.seed, update, "drop", i) < 1000 * config.initialize.dropout for i in samples
        ]
        context = torch.where(torch.tensor(drop, device=self.device)[:, None, None], self.negative, context)
        uniform = per_chunk(TIMESTEPS, config.rollout, config.video.frames, keys).to(self.device)
        timestep = self.schedule.warp(uniform.float())
        noise = SampleNoise(keys, self.device).draw(data.shape, 0, 0)
        noisy = self.schedule.add_noise(data, noise, timestep)
        clean = data if method == "teacher_forcing" else None
        velocity = forced(module, config.rollout, noisy, timestep, context, clean)
        return flow_matching_loss(velocity.float(), noise, data, timestep_weight(timestep, self.schedule))

    def rollout(self) -> RolloutConfig:
        steps = tuple(ode_grid(self.config.rollout.every_step, self.config.initialize.ode_steps)[:-1])
        return replace(
            self.config.rollout, steps=steps, first_steps=None, sampler="ode", context_noise="none"
        )

    def guidance(self) -> float:
        return self.config.initialize.guidance


class Consistency(Initialize):
    """Consistency distillation of a causal teacher on real videos: each chunk's past is clean."""

    def open(self, device: torch.device) -> None:
        super().open(device)
        sizes, engine = self.config.student, self.config.initialize.role.engine
        self.teacher = FrozenEngine(
            lambda: WanTransformer(sizes),
            weights=self.source(),
            zero_stage=3 if engine.zero_stage == 3 else 0,
            dtype=engine.dtype,
        )
        timesteps = self.schedule.few_steps(
            ode_grid(self.config.rollout.every_step, self.config.initialize.ode_steps)
        )
        sigmas = self.schedule.sigma(torch.tensor(timesteps[:-1]))
        self.timesteps = torch.tensor(timesteps, device=device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(device)

    def loss(self, module: Callable[..., Tensor], update: int, samples: range, batch: int) -> Tensor:
        config, rollout = self.config, self.config.rollout
        data, context = self.real_videos(update, samples, batch)
        keys = [(config.seed, update, "consistency", i) for i in samples]
        index = per_chunk(len(self.timesteps) - 1, rollout, config.video.frames, keys).to(self.device)
        timestep, sigma, following = self.timesteps[index], self.sigmas[index], self.sigmas[index + 1]
        noise = SampleNoise(keys, self.device).draw(data.shape, 0, 0)
        noisy = self.schedule.add_noise(data, noise, timestep)
        with torch.no_grad():
            velocity = guided(
                self.teacher.module,
                noisy,
                timestep,
                cond=context,
                uncond=self.negative,
                guidance=config.initialize.guidance,
                clean=data,
                chunk=rollout.chunk,
                window=rollout.context_window(),
            )
            followed = euler_step(noisy, velocity, sigma, following)
            there = self.timesteps[index + 1]
            predicted = self.schedule.x0(
                forced(module, rollout, followed, there, context, data), followed, there
            )
        x0 = self.schedule.x0(forced(module, rollout, noisy, timestep, context, data), noisy, timestep)
        return (x0 - consistency_target(predicted, followed, following)).square().mean()


METHODS: dict[str, type[Initialize]] = {
    "ode": Regression,
    "causal_ode": Regression,
    "causal_consistency": Consistency,
    "teacher_forcing": ForcedFlow,
    "diffusion_forcing": ForcedFlow,
}


def check(config: RunConfig) -> ModelDirectory:
    """The model that the student starts from, checked like the data; ValueError where something does not fit."""
    source, data = ModelDirectory(config.initialize.teacher), config.data
    notes = check_start(config, source)
    with part("rollout"):
        config.rollout.check_frames(config.video.frames)
    settings, skip = (config.text, config.student), data.skip_damaged
    if config.initialize.method == "ode":
        notes += data_check.check("data.train", data.train, *settings, skip_damaged=skip)
    else:
        assert data.real is not None, "the config asks for real videos"
        notes += data_check.check("data.real", data.real, *settings, video=config.video, skip_damaged=skip)
    for note in notes:
        say(f"initialize: {note}")
    return source


def make_initial(config: RunConfig, cluster: Cluster, *, resume: bool) -> None:
    """Make the ODE pairs where the method needs them, and train the initial student, with its own tracking run."""
    teacher = check(config)
    if config.initialize.method in ("ode", "causal_ode"):
        say(f"initialize: {config.initialize.pairs} ODE pairs in {config.initialize.pairs_path}")
        write_pairs(config)
    stage = Stage("initialize", config.initialize, config.seed)
    parents = dict(teacher.card.lineage)
    previous = run_id_of(storage.newest_complete(stage.checkpoints)) if resume else None
    with tracking(config, "initialize", config.initialize.output, parents, previous) as tracker:
        task = METHODS[config.initialize.method](config, {**parents, "initial_student": tracker.run_id})
        path = train(
            stage,
            task,
            tracker=tracker,
            resume=resume,
            progress=partial(progress, stage.name, stage.settings.updates),
        )
        summary("Initial student", {"model": path, "tracking": tracker.how_to_open()})


def command(config: RunConfig, options: Any) -> None:
    config = located("initialize", config)
    with connect(options.address) as cluster:
        make_initial(config, cluster, resume=options.resume)
