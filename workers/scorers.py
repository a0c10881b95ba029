"""Teacher and critic: both score a noisy video; the critic also learns to, on the student's videos."""

from typing import Any, Literal

import torch
from torch import Tensor

from model.objectives.flow_matching import flow_matching_loss
from model.schedule import FlowSchedule
from model.score import ScoreConfig, ScorePlan, guided_x0, predict_x0
from model.transformer import WanTransformer
from workers.actor import Rank, Stats, TrainedRank, samples_in, samples_out, verb
from workers.engine import EngineConfig, FrozenEngine, TrainEngine
from workers.model_directory import ModelDirectory


class _Scorer(Rank):
    def __init__(self, *, rank: int, ranks: int, threads: int, model: str, score: ScoreConfig):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source = ModelDirectory(model)
        self.config = score
        self.schedule = FlowSchedule(score.shift)

    def _inputs(
        self, plan: ScorePlan, samples: list[int], tensors: tuple[Tensor, ...], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Videos, noise, timesteps and contexts from one video a sample, then one context a sample."""
        half = len(samples)
        video, context = samples_in(tensors[:half], device), samples_in(tensors[half:], device)
        noise, timestep = plan.draw(video, samples, self.config)
        return video, noise, timestep, context


class TeacherWorker(_Scorer):
    """One rank of the frozen teacher, replicated or sharded."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        score: ScoreConfig,
        zero_stage: int,
        dtype: Literal["fp32", "bf16"],
        guidance: float,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads, model=model, score=score)
        self.zero_stage, self.dtype, self.guidance = zero_stage, dtype, guidance

    def build(self) -> None:
        sizes = self.source.card.transformer
        self.engine = FrozenEngine(
            lambda: WanTransformer(sizes), weights=self.source, zero_stage=self.zero_stage, dtype=self.dtype
        )

    @verb
    def score(self, uncond: Tensor, plan: ScorePlan, samples: list[int], *tensors: Tensor) -> tuple[Any, ...]:
        """Guided x0 [F, C, H, W], one a sample, of the noised videos: `tensors` are the videos, then the contexts."""
        video, noise, timestep, context = self._inputs(plan, samples, tensors, self.engine.device)
        with torch.no_grad():
            x0 = guided_x0(
                self.engine.module,
                self.schedule.add_noise(video, noise, timestep),
                timestep,
                cond=context,
                uncond=uncond.to(self.engine.device),
                guidance=self.guidance,
                schedule=self.schedule,
            )
        return {}, *samples_out(x0)


class CriticWorker(_Scorer, TrainedRank):
    """One rank of the critic, the score of what the student generates."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        score: ScoreConfig,
        engine: EngineConfig,
        activation_checkpointing: bool,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads, model=model, score=score)
        self.engine_config, self.activation_checkpointing = engine, activation_checkpointing

    def build(self) -> None:
        sizes, checkpointing = self.source.card.transformer, self.activation_checkpointing
        self.engine = TrainEngine(
            lambda: WanTransformer(sizes, activation_checkpointing=checkpointing),
            self.engine_config,
            weights=self.source,
        )

    @verb
    def score(self, plan: ScorePlan, samples: list[int], *tensors: Tensor) -> tuple[Any, ...]:
        """x0 [F, C, H, W], one a sample, as `TeacherWorker.score` without guidance."""
        video, noise, timestep, context = self._inputs(plan, samples, tensors, self.engine.device)
        noisy = self.schedule.add_noise(video, noise, timestep)
        with torch.no_grad():
            x0 = predict_x0(self.engine.module, noisy, timestep, context, self.schedule)
        return {}, *samples_out(x0)

    @verb
    def update(self, plan: ScorePlan, samples: list[int], *tensors: Tensor) -> Stats:
        """One micro-batch of flow matching on the student's videos; the last one of an update also steps."""
        video, noise, timestep, context = self._inputs(plan, samples, tensors, self.engine.device)
        velocity = self.engine.module(self.schedule.add_noise(video, noise, timestep), timestep, context)
        loss = flow_matching_loss(velocity.float(), noise, video)
        self.engine.backward(loss)
        result = self.engine.step()
        # Left out of the other micro-batches, whose zeros the mean over an update would take for norms.
        norm = {"grad_norm": result.grad_norm} if result.stepped or result.grad_norm else {}
        return {"loss": loss.item(), **norm}
