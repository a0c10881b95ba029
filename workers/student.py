"""The student: generates by self-rollout, keeps the graph, pulls a gradient back through it, and steps."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infra import storage
from model.kv_cache import BlockCache
from model.noise import SampleNoise
from model.objectives import ObjectiveConfig
from model.rollout import Rollout, RolloutConfig, RolloutPlan, generate
from model.transformer import WanTransformer
from workers.actor import Stats, TrainedRank, samples_in, samples_out, verb
from workers.engine import EngineConfig, TrainEngine
from workers.model_directory import ModelCard, ModelDirectory, ModelWriter


@dataclass(frozen=True)
class _Graph:
    """A video whose graph is alive, the weights it was made with, and what the objective sends it."""

    video: Tensor
    version: int
    gradient: Tensor | None = None


class StudentWorker(TrainedRank):
    """One rank of the student."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        rollout: RolloutConfig,
        objective: ObjectiveConfig,
        engine: EngineConfig,
        activation_checkpointing: bool,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source = ModelDirectory(model)
        self.config = rollout
        self.objective = objective
        self.engine_config = engine
        self.activation_checkpointing = activation_checkpointing
        self._graph: _Graph | None = None

    def build(self) -> None:
        sizes, checkpointing = self.source.card.transformer, self.activation_checkpointing
        self.engine = TrainEngine(
            lambda: WanTransformer(sizes, activation_checkpointing=checkpointing),
            self.engine_config,
            weights=self.source,
        )

    @verb
    def rollout(self, plan: RolloutPlan, samples: list[int], *contexts: Tensor) -> tuple[Any, ...]:
        """Videos [F, C, H, W], one a sample, for prompt embeddings [text_len, text_dim].

        If the plan carries a gradient its graph is kept, to be consumed by `pullback`; RuntimeError if one is alive already.
        """
        if plan.grad_frames and self._graph is not None:
            raise RuntimeError(
                "a rollout with gradient was asked for while the graph of the last one is alive; pull it back first."
            )
        video = self._generate(plan, samples, contexts)
        if plan.grad_frames:
            self._graph = _Graph(video, self.engine.version)
        return {}, *samples_out(video)

    def _generate(self, plan: RolloutPlan, samples: list[int], contexts: tuple[Tensor, ...]) -> Tensor:
        sizes, shape = self.source.card.transformer, self.source.card.video
        device = self.engine.device
        rollout = Rollout(
            self.config,
            plan,
            noise=SampleNoise([(*plan.noise, sample) for sample in samples], device),
            cache=BlockCache(
                self.config.context_window(), sizes.grid(shape.height, shape.width), sizes.head_dim, device
            ),
            shape=(len(samples), shape.channels, shape.height, shape.width),
        )
        return torch.cat(list(generate(self.engine.module, rollout, samples_in(contexts, device))), dim=1)

    @verb
    def judge(self, samples: list[int], *predictions: Tensor) -> Stats | tuple[Any, ...]:
        """The objective of the kept rollout: `predictions` are those that it reads, each with one a sample.

        It is computed on leaves, so what crosses actors are videos and never a graph. Its gradient with respect to the video is kept for
        `pullback`; those with respect to the predictions through which it flows are returned. RuntimeError if there is no graph.
        """
        if self._graph is None:
            raise RuntimeError("judge needs the graph of a rollout with gradient, and none is alive.")
        count, reads, flows = len(samples), self.objective.reads, self.objective.flows
        leaves: dict[Any, Tensor] = {
            name: samples_in(predictions[i * count : (i + 1) * count], self.engine.device)
            for i, name in enumerate(reads)
        }
        leaves["video"] = self._graph.video.detach()
        wanted = [leaves[name].requires_grad_() for name in ("video", *flows)]
        loss = self.objective(leaves)
        # A loss that does not look at the video itself, such as the adversarial one, sends it nothing directly.
        gradient, *cotangents = torch.autograd.grad(loss, wanted, materialize_grads=True)
        self._graph = replace(self._graph, gradient=gradient)
        stats = {"loss": loss.item()}
        if {"real", "fake"} <= set(reads):
            stats["score_gap"] = (leaves["fake"] - leaves["real"]).detach().abs().mean().item()
        # Ray hands an answer of one value over as it is, and a tuple of one as a tuple.
        return (stats, *(sample for each in cotangents for sample in samples_out(each))) if flows else stats

    @verb
    def pullback(self, samples: list[int], *gradients: Tensor) -> Stats:
        """Backward through the kept rollout. `gradients` with respect to the video, one a sample from each scorer that the objective
        flows through, add to what `judge` kept.

        RuntimeError if nothing was judged, or if the weights have changed since the rollout.
        """
        graph, self._graph = self._graph, None
        if graph is None or graph.gradient is None:
            raise RuntimeError("pullback needs a rollout with gradient that was judged, and there is none.")
        if graph.version != self.engine.version:
            raise RuntimeError(
                f"the graph was made with weights {graph.version}, and they are now {self.engine.version}."
            )
        gradient = graph.gradient
        for first in range(0, len(gradients), len(samples)):
            gradient = gradient + samples_in(gradients[first : first + len(samples)], self.engine.device)
        self.engine.backward((graph.video * gradient).sum())
        return {}

    @verb
    def step(self) -> Stats:
        """One optimizer step once all micro-batches are pulled back; RuntimeError while a graph is alive."""
        if self._graph is not None:
            raise RuntimeError("step was called while the graph of a rollout is alive; pull it back first.")
        result = self.engine.step()
        return {"grad_norm": result.grad_norm}

    def export(self, staging: str, card: ModelCard) -> None:
        """Write the averaged weights (the current ones where none are kept) into a model's staging location; on all ranks."""
        with storage.writing(staging) as directory:
            writer = ModelWriter(directory)
            self.engine.export(writer.write, ema=self.engine_config.ema_decay is not None)
            if self.rank == 0:
                writer.finish(card, self.source.text_weights())
