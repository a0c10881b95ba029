"""The student: generates by self-rollout, keeps the graph, pulls a gradient back through it, and steps."""

from dataclasses import dataclass, replace
from typing import cast

import ray
import torch
from ray import ObjectRef
from torch import Tensor

from infra import storage
from model import replay, watch
from model.adapters import AdapterConfig, effective
from model.backbone import Backbone, Prepared
from model.codec import to_uint8
from model.families import prepared
from model.forcing import ForcedPlan
from model.objectives import ObjectiveConfig
from model.replay import Tape
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.score import ScoreConfig, ScorePlan
from workers import build
from workers.actor import Stats, TrainedRank
from workers.batch import Batch
from workers.engine import EngineConfig, finite
from workers.model_directory import ModelCard, ModelDirectory, ModelWriter
from workers.prompts import TrainingData
from workers.rollout import roll_out
from workers.step_watch import StepWatch


@dataclass(frozen=True)
class _Graph:
    """A video whose gradient is to come, the weights it was made with, and what the objective sends it."""

    video: Tensor
    version: int
    replayed: tuple[Tape, Tensor] | None = None
    """Where the video has no graph: what its gradient is made from, and the prompts."""
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
        data: TrainingData,
        rollout: RolloutConfig,
        objective: ObjectiveConfig,
        score: ScoreConfig,
        directions: bool,
        compile: bool,
        gather: bool,
        engine: EngineConfig,
        activation_checkpointing: bool,
        adapters: AdapterConfig,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source, self.data = ModelDirectory(model, verified=True), data
        self.config = rollout
        self.objective, self.score = objective, score
        self.directions = directions
        self.compile, self.gather = compile, gather
        self.reference: watch.Reference | None = None
        self.engine_config = engine
        self.activation_checkpointing = activation_checkpointing
        self.adapters = adapters
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        """By their samples: one alone, or any number of those that are replayed."""

    def build(self) -> None:
        self.engine = build.trained(
            self.source,
            self.engine_config,
            activation_checkpointing=self.activation_checkpointing,
            adapters=self.adapters,
        )
        self.watch = StepWatch(self.engine, directions=self.directions)

    def forget(self) -> None:
        """Drop the graphs that are alive, if any."""
        self._graphs.clear()

    def refer(self, reference: watch.Reference | None) -> None:
        """Take what the latents of the student's videos are compared with."""
        self.reference = reference

    @property
    def network(self) -> Backbone:
        return cast(Backbone, self.engine.module)

    def rollout(self, plan: RolloutPlan, batch: Batch) -> tuple[Stats, Batch]:
        """A `video` [F, C, H, W] for each prompt embedding `context` [text_len, text_dim].

        Where the plan has given frames, it starts with those of the data's `data_video`. If the plan carries
        a gradient the graph is kept, or what it is replayed from, to be consumed by `pullback`; RuntimeError
        if a graph is alive already.
        """
        self._check_room(graph=plan.keeps_graph)
        video, tape = self._generate(plan, batch)
        if plan.grad_frames:
            replayed = (tape, batch["context"]) if plan.replayed else None
            self._keep(batch, _Graph(video, self.engine.version, replayed))
        return {}, Batch(batch.samples, {"video": video})

    def film(self, plan: RolloutPlan, batch: Batch) -> tuple[Stats, Batch]:
        """The `frames` uint8 [T, height, width, 3] of a rollout, decoded here, for people to look at."""
        codec = self.source.card.video.make_codec()
        assert codec is not None, "there is nothing to look at without a codec"
        videos, _ = self._generate(plan, batch)
        frames = [torch.from_numpy(to_uint8(codec.decode(video[None])[0])) for video in videos]
        return {}, Batch(batch.samples, {"frames": torch.stack(frames)})

    def predict(self, plan: ForcedPlan, batch: Batch) -> tuple[Stats, Batch]:
        """What `rollout` answers, predicted on the data's noised `data_video` instead."""

        self._check_room(graph=plan.gradient)
        data, context = batch["data_video"], batch["context"]
        video = plan.predict(self.network, self.config, data, context, batch.samples)
        if plan.gradient:
            self._keep(batch, _Graph(video, self.engine.version))
        return {}, Batch(batch.samples, {"video": video})

    def _check_room(self, *, graph: bool) -> None:
        if graph and self._graphs:
            raise RuntimeError(
                "a video with gradient was asked for while the graph of the last one is alive; pull it "
                "back first."
            )

    def _keep(self, batch: Batch, graph: _Graph) -> None:
        self._graphs[tuple(batch.samples)] = graph

    def _generate(self, plan: RolloutPlan, batch: Batch) -> tuple[Tensor, Tape]:
        ready, device = self._ready(), self.engine.device
        return roll_out(self.network, self.source, self.config, plan, batch, device, ready)

    def adopt(self, plan: RolloutPlan, batch: Batch) -> tuple[Stats, Batch]:
        """Keep `video`s that replicas have rolled out, with what their gradient is replayed from."""
        tape = Tape.of(batch.columns, self.config, plan)
        self._keep(batch, _Graph(batch["video"], self.engine.version, (tape, batch["context"])))
        return {}, Batch(batch.samples)

    def shared_weights(self) -> dict[str, ObjectRef]:
        """The weights, whole, one object each in Ray's store, from rank 0; on all ranks at once."""
        with self.engine.whole():
            if self.rank > 0:
                return {}
            return {name: ray.put(weight.cpu()) for name, weight in effective(self.network)}

    def _ready(self) -> Prepared | None:
        """The network for a rollout's calls without gradient; None where its weights stay sharded."""
        if self.engine_config.zero_stage == 3 and not self.gather:
            return None
        with self.engine.whole():
            return prepared(self.network, compiled=self.compile)

    def judge(self, plan: ScorePlan, batch: Batch) -> tuple[Stats, Batch]:
        """The objective of the kept video, from the predictions that it reads, which are the batch's columns.

        The plan is that of the scores. It is computed on leaves, so what crosses actors are videos and never
        a graph. Its gradient with respect to the video is kept for `pullback`; those with respect to the
        predictions through which it flows are returned under their names. RuntimeError if there is no graph.
        """
        graph = self._graphs.get(tuple(batch.samples))
        if graph is None:
            raise RuntimeError("judge needs the graph of a rollout with gradient, and none is alive.")
        flows = self.objective.flows
        leaves: dict[str, Tensor] = {**batch.columns, "video": graph.video.detach()}
        wanted = [leaves[name].requires_grad_() for name in ("video", *flows)]
        loss = self.objective(leaves)
        # A loss that does not look at the video itself, such as the adversarial one, sends it nothing
        # directly.
        gradient, *cotangents = torch.autograd.grad(loss * finite(loss), wanted, materialize_grads=True)
        self._keep(batch, replace(graph, gradient=gradient))
        stats = {"loss": loss.item(), **self.objective.statistics(leaves)}
        stats |= watch.of_latents(leaves["video"], self.reference)
        if "real" in leaves and "fake" in leaves:
            timestep = plan.timesteps(batch.samples, self.score)
            stats |= watch.by_band(timestep, score_gap=watch.score_gap(leaves["real"], leaves["fake"]).cpu())
        return stats, Batch(batch.samples, dict(zip(flows, cotangents, strict=True)))

    def pullback(self, plan: None, batch: Batch) -> tuple[Stats, Batch]:
        """Backward through the kept video, or its replay. The batch's columns are gradients with respect to
        it, one from each scorer that the objective flows through; they add to what `judge` kept.

        RuntimeError if nothing was judged, or if the weights have changed since the rollout.
        """
        graph = self._graphs.pop(tuple(batch.samples), None)
        if graph is None or graph.gradient is None:
            raise RuntimeError("pullback needs a rollout with gradient that was judged, and there is none.")
        if graph.version != self.engine.version:
            raise RuntimeError(
                f"the graph was made with weights {graph.version}, and they are now {self.engine.version}."
            )
        gradient, video = sum(batch.columns.values(), start=graph.gradient), graph.video
        if graph.replayed is not None:
            video = replay.replay(self.network, *graph.replayed, self.config.context_window())
        self.engine.backward((video * gradient[:, -video.shape[1] :]).sum())
        return {}, Batch(batch.samples)

    def step(self, plan: None, batch: Batch) -> tuple[Stats, Batch]:
        """One optimizer step once all micro-batches are pulled back; RuntimeError while a graph is alive."""
        if self._graphs:
            raise RuntimeError("step was called while the graph of a rollout is alive; pull it back first.")
        self.watch.before()
        result = self.engine.step()
        stats = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        stats["steps"] = self.engine.version
        return stats | self.watch.after(), batch

    def export(self, staging: str, card: ModelCard) -> None:
        """Write the averaged weights (or the current ones) into a model's staging location; on all ranks."""
        with storage.writing(staging) as directory:
            writer = ModelWriter(directory)
            build.write_weights(self.engine, writer, self.source, self.adapters)
            if self.rank == 0:
                writer.finish(card, self.source.text_weights())
