"""`self-forcing initialize`: the initial student, block-causal, from a model of its size.

How it learns is a method of `model/initialization/`; this reads what that learns from, and publishes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from infra.settings import part
from model.backbone import velocity_of
from model.forcing import Module
from model.initialization.method import Setup, Share
from orchestrator.cluster import Cluster
from orchestrator.config import RunConfig
from orchestrator.handover import check_start
from orchestrator.single_model import Task
from orchestrator.stages import whole_stage
from pipelines.console import say, summary
from pipelines.ode_pairs import missing_pairs, write_pairs
from pipelines.pretrain import export_model
from pipelines.tracked import Ready, on_cluster, opened, tracking
from pipelines.train_model import train_model
from workers import data_check
from workers.build import frozen, trained, write_weights
from workers.dataset import ParquetDataset
from workers.engine import TrainEngine
from workers.model_directory import ModelCard, ModelDirectory
from workers.prompts import LatentDataset, Prompts


@dataclass
class Initialize(Task):
    """Trains an initial student by the method that the config names."""

    config: RunConfig
    lineage: Mapping[str, str]
    compile = False

    def source(self) -> ModelDirectory:
        return ModelDirectory(self.config.initialize.teacher, verified=True)

    def engine(self) -> TrainEngine:
        role = self.config.initialize.role
        return trained(
            self.source(),
            whole_stage(role.engine, self.config.initialize.updates),
            activation_checkpointing=role.activation_checkpointing,
            adapters=role.adapters,
        )

    def open(self, device: torch.device) -> None:
        settings, source = self.config.initialize, self.source()
        self.prompts = Prompts(source, device)
        guide = self.config.distill.roles.teacher
        negative = self.prompts.negative(guide.negative_prompt, guide.negative_embedding).to(device)
        teacher = self._teacher(source) if settings.chosen.asks_teacher else None
        self.setup = Setup(settings, self.config.rollout, negative, teacher, device)
        if settings.chosen.data == "pairs":
            tensors = ["trajectory", *(["clean"] if settings.chosen.real_videos else [])]
            self.pairs = ParquetDataset(settings.pairs_path, [self.prompts.column, *tensors])
        else:
            data = self.config.data
            assert data.real is not None, "the config asks for real videos"
            self.videos = LatentDataset(
                data.real, self.config.video, self.prompts.column, skip_damaged=data.skip_damaged
            )

    def _teacher(self, source: ModelDirectory) -> Callable[..., Tensor]:
        engine = self.config.initialize.role.engine
        stage = 3 if engine.zero_stage == 3 else 0
        self.frozen = frozen(source, zero_stage=stage, dtype=engine.dtype)
        return partial(velocity_of, self.frozen.module)

    def loss(self, module: Module, update: int, samples: range, *, batch: int, position: int) -> Tensor:
        device, seed, method = self.setup.device, self.config.seed, self.config.initialize.chosen
        where = (position + samples.start, len(samples), seed)
        trajectory = clean = None
        if method.data == "pairs":
            rows = self.pairs.batch(*where)
            trajectory = torch.stack([row["trajectory"] for row in rows]).to(device).float()
            if method.real_videos:
                clean = torch.stack([row["clean"] for row in rows]).to(device).float()
            prompts = [row[self.prompts.column] for row in rows]
        else:
            latents, prompts = self.videos.batch(*where)
            clean = torch.stack(latents).to(device)
        context = torch.stack(self.prompts.embed(prompts)).to(device)
        return method.loss(
            module, self.setup, Share(context, clean, trajectory, seed, update, samples, batch)
        )

    def export(self, engine: TrainEngine, path: str) -> None:
        config, source = self.config, self.source()
        rollout, guidance = config.initialize.generates(config.rollout)
        card = ModelCard(
            True,
            config.student,
            config.video,
            source.card.text,
            rollout=rollout,
            guidance=guidance,
            shift=config.rollout.shift,
            dtype=config.initialize.role.engine.dtype,
            text_digest=source.card.text_digest,
            lineage=self.lineage,
            recipe=config.portable(),
        )
        adapters = config.initialize.role.adapters
        export_model(
            path, card, source.text_weights(), lambda writer: write_weights(engine, writer, source, adapters)
        )


def check(config: RunConfig) -> ModelDirectory:
    """The model that the student starts from, checked like the data; ValueError if it does not fit."""
    source, data = ModelDirectory(config.initialize.teacher), config.data
    notes = check_start(config, source)
    with part("rollout"):
        config.rollout.check_frames(config.video.frames)
    settings, skip = (config.text, config.student), data.skip_damaged
    encoder = source.card.text_digest
    if not config.initialize.chosen.real_videos:
        notes += data_check.check("data.train", data.train, *settings, skip_damaged=skip, encoder=encoder)
    else:
        assert data.real is not None, "the config asks for real videos"
        notes += data_check.check(
            "data.real", data.real, *settings, video=config.video, skip_damaged=skip, encoder=encoder
        )
    guide = config.distill.roles.teacher
    data_check.check_negative(guide.negative_prompt, guide.negative_embedding, config.student, encoder)
    for note in notes:
        say(f"initialize: {note}")
    return source


def make_initial(config: RunConfig, *, resume: bool, allow: Sequence[str] = ()) -> Ready:
    """Check all that the initial student learns from; what is returned makes ODE pairs, where they are needed
    and not there, and trains it, with its own tracking run."""
    parents = dict(check(config).card.lineage)
    missing = config.initialize.chosen.data == "pairs" and missing_pairs(config)
    state = opened(config, "initialize", resume=resume, allow=allow)

    def make(_: Cluster) -> None:
        if missing:
            say(f"initialize: {config.initialize.pairs} ODE pairs in {config.initialize.pairs_path}")
            write_pairs(config)
        with tracking(config, state.stage, state.output, parents, state) as tracker:
            task = Initialize(config, {**parents, "initial_student": tracker.run_id})
            path = train_model(config, replace(state, run_id=tracker.run_id), task, tracker)
            summary("Initial student", {"model": path, "tracking": tracker.how_to_open()})

    return make


command = partial(on_cluster, "initialize", make_initial)
