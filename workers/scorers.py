"""Teacher and critic: both score a noisy video; the critic also learns to, on the student's videos."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Graph:
    """A prediction whose graph is alive, the video that it is of, and the weights it was made with."""

    video: Tensor
    prediction: Tensor
    version: int


class _Scorer(Rank):
    engine: Any  # a FrozenEngine or a TrainEngine

    def __init__(self, *, rank: int, ranks: int, threads: int, model: str, score: ScoreConfig):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source = ModelDirectory(model)
        self.config = score
        self.schedule = FlowSchedule(score.shift)
        self._graph: _Graph | None = None

    def _inputs(
        self, plan: ScorePlan, samples: list[int], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Videos, noise, timesteps and contexts from one video a sample, then one context a sample."""
        half, device = len(samples), self.engine.device
        video, context = samples_in(tensors[:half], device), samples_in(tensors[half:], device)
        noise, timestep = plan.draw(video, samples, self.config)
        return video, noise, timestep, context

    def _answer(
        self,
        keep: bool,
        plan: ScorePlan,
        samples: list[int],
        tensors: tuple[Tensor, ...],
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Any, ...]:
        """x0 by `predict` (noisy video, timestep, context); its graph is kept for `pullback` if `keep`."""
        if keep and self._graph is not None:
            raise RuntimeError(
                "a score to be pulled back was asked for while the graph of the last one is alive."
            )
        video, noise, timestep, context = self._inputs(plan, samples, tensors)
        video.requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            x0 = predict(self.schedule.add_noise(video, noise, timestep), timestep, context)
        if keep:
            self._graph = _Graph(video, x0, self.engine.version)
        return {}, *samples_out(x0)

    @verb
    def pullback(self, samples: list[int], *cotangents: Tensor) -> tuple[Any, ...]:
        """Gradients with respect to the videos of the kept score, one a sample, from those with respect to its x0.

        The weights' own gradients stay as they are. RuntimeError if there is no graph, or if the weights have changed since.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            raise RuntimeError("pullback needs the graph of a score, and none is alive.")
        if graph.version != self.engine.version:
            raise RuntimeError(
                f"the graph was made with weights {graph.version}, and they are now {self.engine.version}."
            )
        cotangent = samples_in(cotangents, self.engine.device)
        (gradient,) = torch.autograd.grad(graph.prediction, graph.video, cotangent)
        return {}, *samples_out(gradient)


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
    def score(
        self, keep: bool, plan: ScorePlan, uncond: Tensor, samples: list[int], *tensors: Tensor
    ) -> tuple[Any, ...]:
        """Guided x0 [F, C, H, W], one a sample, of the noised videos: `tensors` are the videos, then the contexts.

        With `keep` its graph is kept, to be consumed by `pullback`; RuntimeError if one is alive already.
        """

        def predict(noisy: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return guided_x0(
                self.engine.module,
                noisy,
                timestep,
                cond=context,
                uncond=uncond.to(self.engine.device),
                guidance=self.guidance,
                schedule=self.schedule,
            )

        return self._answer(keep, plan, samples, tensors, predict)


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
    def score(self, keep: bool, plan: ScorePlan, samples: list[int], *tensors: Tensor) -> tuple[Any, ...]:
        """x0 [F, C, H, W], one a sample, as `TeacherWorker.score` without guidance."""

        def predict(noisy: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return predict_x0(self.engine.module, noisy, timestep, context, self.schedule)

        return self._answer(keep, plan, samples, tensors, predict)

    @verb
    def update(self, plan: ScorePlan, samples: list[int], *tensors: Tensor) -> Stats:
        """One micro-batch of flow matching on the student's videos; the last one of an update also steps."""
        if self._graph is not None:
            raise RuntimeError("update was called while the graph of a score is alive; pull it back first.")
        video, noise, timestep, context = self._inputs(plan, samples, tensors)
        velocity = self.engine.module(self.schedule.add_noise(video, noise, timestep), timestep, context)
        loss = flow_matching_loss(velocity.float(), noise, video)
        self.engine.backward(loss)
        result = self.engine.step()
        # Left out of the other micro-batches, whose zeros the mean over an update would take for norms.
        norm = {"grad_norm": result.grad_norm} if result.stepped or result.grad_norm else {}
        return {"loss": loss.item(), **norm}
