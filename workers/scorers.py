"""Scorers of a noisy video, and the frozen teacher, which is one; the critic is the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.objectives import Prediction
from model.schedule import FlowSchedule
from model.score import ScoreConfig, ScorePlan, guided_x0
from model.transformer import WanTransformer
from workers.actor import Rank, samples_out, verb
from workers.engine import FrozenEngine
from workers.model_directory import ModelDirectory

Predictions = dict[Prediction, Tensor]


@dataclass(frozen=True)
class _Graph:
    """Predictions whose graph is alive, the video that they are of, and the weights they were made with."""

    video: Tensor
    predictions: Predictions
    version: int


class Scorer(Rank):
    """One rank that answers with predictions of a noisy video, and pulls gradients back through them."""

    def __init__(self, *, rank: int, ranks: int, threads: int, model: str, score: ScoreConfig):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source = ModelDirectory(model)
        self.config = score
        self.schedule = FlowSchedule(score.shift)
        self._graph: _Graph | None = None

    def _answer(
        self,
        keep: bool,
        plan: ScorePlan,
        samples: list[int],
        tensors: tuple[Tensor, ...],
        predict: Callable[[Tensor, Tensor, Tensor], Predictions],
    ) -> tuple[Any, ...]:
        """What `predict` (noisy video, timestep, context) gives; its graph is kept for `pullback` if `keep`."""
        if keep and self._graph is not None:
            raise RuntimeError(
                "a score to be pulled back was asked for while the graph of the last one is alive."
            )
        video, context = self.columns(samples, tensors)
        noise, timestep = plan.draw(video, samples, self.config)
        video.requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            predictions = predict(self.schedule.add_noise(video, noise, timestep), timestep, context)
        if keep:
            self._graph = _Graph(video, predictions, self.engine.version)
        return {}, *(sample for each in predictions.values() for sample in samples_out(each))

    @verb
    def pullback(
        self, names: Sequence[Prediction], samples: list[int], *cotangents: Tensor
    ) -> tuple[Any, ...]:
        """Gradients with respect to the videos of the kept score, one a sample, from those with respect to the predictions `names`.

        The weights' own gradients stay as they are. RuntimeError if there is no graph, or if the weights have changed since.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            raise RuntimeError("pullback needs the graph of a score, and none is alive.")
        if graph.version != self.engine.version:
            raise RuntimeError(
                f"the graph was made with weights {graph.version}, and they are now {self.engine.version}."
            )
        (gradient,) = torch.autograd.grad(
            [graph.predictions[name] for name in names], graph.video, self.columns(samples, cotangents)
        )
        return {}, *samples_out(gradient)


class TeacherWorker(Scorer):
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
        # Recomputing happens under a gradient only, which a score has where the objective flows through it.
        self.engine = FrozenEngine(
            lambda: WanTransformer(sizes, activation_checkpointing=True),
            weights=self.source,
            zero_stage=self.zero_stage,
            dtype=self.dtype,
        )

    @verb
    def score(
        self, keep: bool, plan: ScorePlan, uncond: Tensor, samples: list[int], *tensors: Tensor
    ) -> tuple[Any, ...]:
        """Guided x0 [F, C, H, W], one a sample, of the noised videos: `tensors` are the videos, then the contexts.

        With `keep` its graph is kept, to be consumed by `pullback`; RuntimeError if one is alive already.
        """

        def predict(noisy: Tensor, timestep: Tensor, context: Tensor) -> Predictions:
            real = guided_x0(
                self.engine.module,
                noisy,
                timestep,
                cond=context,
                uncond=uncond.to(self.engine.device),
                guidance=self.guidance,
                schedule=self.schedule,
            )
            return {"real": real}

        return self._answer(keep, plan, samples, tensors, predict)
