"""Scorers of a noisy video: what teacher and critic have in common."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from model import watch
from model.schedule import FlowSchedule
from model.score import ScoreConfig, ScorePlan
from workers.actor import Rank, Stats
from workers.batch import Batch
from workers.model_directory import ModelDirectory
from workers.prompts import TrainingData

Predictions = dict[str, Tensor]
"""By the names that the scorer `makes`: x0 [B, F, C, H, W], logits [B, classes]."""


@dataclass(frozen=True)
class _Graph:
    """Predictions whose graph is alive, the video that they are of, and the weights they were made with."""

    video: Tensor
    predictions: Predictions
    version: int


class Scorer(Rank):
    """One rank that answers with predictions of a noisy video, and pulls gradients back through them."""

    def __init__(
        self, *, rank: int, ranks: int, threads: int, model: str, data: TrainingData, score: ScoreConfig
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source, self.data = ModelDirectory(model, verified=True), data
        self.config = score
        self.schedule = FlowSchedule(score.shift)
        self._graph: _Graph | None = None

    def forget(self) -> None:
        """Drop the graph that is alive, if any: what it was kept for is asked for anew."""
        self._graph = None

    @abstractmethod
    def predict(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> Predictions:
        """Of noisy videos [B, F, C, H, W] at timesteps [B], for prompts [B, text_len, text_dim]."""

    def score(self, plan: ScorePlan, batch: Batch) -> tuple[Stats, Batch]:
        """Predictions of each `video` [F, C, H, W], noised, for its `context` [text_len, text_dim].

        If the plan carries a gradient their graph is kept, for `pullback`; RuntimeError if one is alive.
        """
        if plan.gradient and self._graph is not None:
            raise RuntimeError(
                "a score to be pulled back was asked for while the graph of the last one is alive."
            )
        video = batch["video"]
        noise, timestep = plan.draw(video, batch.samples, self.config)
        video.requires_grad_(plan.gradient)
        with torch.set_grad_enabled(plan.gradient):
            noisy = self.schedule.add_noise(video, noise, timestep)
            predictions = self.predict(noisy, timestep, batch["context"])
        if plan.gradient:
            self._graph = _Graph(video, predictions, self.engine.version)
        return self._seen(plan, video, timestep, predictions), Batch(batch.samples, predictions)

    def _seen(self, plan: ScorePlan, video: Tensor, timestep: Tensor, predictions: Predictions) -> Stats:
        """How well the student's videos were denoised: the flow matching loss by noise band."""
        x0 = next((predictions[name] for name in ("real", "fake") if name in predictions), None)
        if x0 is None or plan.like is not None:  # which is of the data
            return {}
        flow = watch.flow_loss(x0, video, self.schedule.sigma(timestep))
        return watch.by_band(timestep.cpu(), flow=flow.cpu())

    def pullback(self, plan: None, batch: Batch) -> tuple[Stats, Batch]:
        """The `gradient` with respect to each video of the kept score, from those to its predictions.

        The batch's columns name the predictions. The weights' own gradients stay as they are. RuntimeError if
        there is no graph, or if the weights have changed since.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            raise RuntimeError("pullback needs the graph of a score, and none is alive.")
        if graph.version != self.engine.version:
            raise RuntimeError(
                f"the graph was made with weights {graph.version}, and they are now {self.engine.version}."
            )
        predictions = [graph.predictions[name] for name in batch.columns]
        (gradient,) = torch.autograd.grad(predictions, graph.video, list(batch.columns.values()))
        return {}, Batch(batch.samples, {"gradient": gradient})
