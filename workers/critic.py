"""The critic: learns the score of the student's videos, and perhaps to tell them from data."""

from typing import Any

import torch
from torch import Tensor

from model.adapters import AdapterConfig
from model.noise import SampleNoise
from model.objectives.flow_matching import flow_matching_loss
from model.objectives.gan import (
    DiscriminatorConfig,
    discriminator_loss,
    gradient_penalty,
    relativistic_discriminator_loss,
)
from model.score import ScoreConfig, ScorePlan
from model.sequence import groups_of
from workers import build
from workers.actor import Stats, TrainedRank
from workers.batch import Batch
from workers.engine import EngineConfig
from workers.prompts import TrainingData
from workers.scorer import Predictions, Scorer


class CriticWorker(Scorer, TrainedRank):
    """One rank of the critic, the score of what the student generates, and perhaps a judge of it."""

    makes = ("fake", "logits")

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        data: TrainingData,
        score: ScoreConfig,
        discriminator: DiscriminatorConfig,
        relativistic: bool,
        sequence: int,
        engine: EngineConfig,
        activation_checkpointing: bool,
        adapters: AdapterConfig,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads, model=model, data=data, score=score)
        self.discriminator, self.relativistic = discriminator, relativistic
        self.sequence = sequence
        self.engine_config, self.activation_checkpointing = engine, activation_checkpointing
        self.adapters = adapters

    def build(self) -> None:
        self.engine = build.trained(
            self.source,
            self.engine_config,
            activation_checkpointing=self.activation_checkpointing,
            adapters=self.adapters,
            branch=self.discriminator if self.discriminator.taps else None,
        )
        network: Any = self.engine.module
        network = network.transformer if self.discriminator.taps else network
        network.sequence = groups_of(self.sequence)

    def _answer(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity and, where there is a branch, logits."""
        answer = self.engine.module(noisy, timestep, context)
        return answer.velocity, answer.logits if self.discriminator.taps else None

    def predict(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> Predictions:
        """`fake`: x0, without guidance; and `logits` where there is a branch."""
        velocity, logits = self._answer(noisy, timestep, context)
        fake = {"fake": self.schedule.x0(velocity, noisy, timestep)}
        return fake if logits is None else {**fake, "logits": logits}

    def update(self, plan: ScorePlan, batch: Batch) -> tuple[Stats, Batch]:
        """One micro-batch of flow matching on the student's `video`s for their `context`s, and of telling
        them from data (`data_video`, `data_context`) where there is a branch; the last one of an update also
        steps."""
        if self._graph is not None:
            raise RuntimeError("update was called while the graph of a score is alive; pull it back first.")
        video, context = batch["video"], batch["context"]
        noise, timestep = plan.draw(video, batch.samples, self.config)
        noisy = self.schedule.add_noise(video, noise, timestep)
        if self.discriminator.taps:
            velocity, losses = self._judge(plan, batch, noisy, noise, timestep)
            flow_weight = self.discriminator.flow_weight
        else:
            velocity, losses = self._answer(noisy, timestep, context)[0], {}
            flow_weight = 1.0
        flow = flow_matching_loss(velocity.float(), noise, video)
        loss = sum(losses.values(), start=flow * flow_weight)
        self.engine.backward(loss)
        result = self.engine.step()
        # Left out of the other micro-batches, whose zeros the mean over an update would take in.
        due = result.stepped or result.grad_norm
        step = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate} if due else {}
        step |= {"steps": self.engine.version} if due else {}
        values = {name: value.item() for name, value in losses.items()}
        return {"loss": flow.item(), **values, **step}, Batch(batch.samples)

    def _judge(
        self, plan: ScorePlan, batch: Batch, noisy: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity of the student's noisy videos, and the weighted losses of the branch."""
        settings = self.discriminator
        context, data_context = batch["context"], batch["data_context"]
        noisy_data = self.schedule.add_noise(batch["data_video"], noise, timestep)
        velocity, logits = self._answer(
            torch.cat([noisy, noisy_data]), timestep.repeat(2), torch.cat([context, data_context])
        )
        assert logits is not None, "only a branch judges"
        fake, real = logits.chunk(2)
        judge = relativistic_discriminator_loss if self.relativistic else discriminator_loss
        losses = {"discriminator": settings.weight * judge(fake, real)}
        sources = SampleNoise([(*plan.noise, sample) for sample in batch.samples], noisy.device)
        for name, weight, sigma, x_t, prompt, before, step in (
            ("r1", settings.r1_weight, settings.r1_sigma, noisy_data, data_context, real, 1),
            ("r2", settings.r2_weight, settings.r2_sigma, noisy, context, fake, 2),
        ):
            if weight:
                _, perturbed = self._answer(x_t + sigma * sources.draw(x_t.shape, 0, step), timestep, prompt)
                assert perturbed is not None
                losses[name] = 0.5 * weight * gradient_penalty(perturbed, before, sigma)
        return velocity[: len(noisy)], losses
