"""Rollout replicas: the student's weights, whole and frozen, and nothing of its training.

They make the student's videos in its place: any number of them, in a type of their own, joined to no process
group. After every student step they take its weights, so none makes a video with older ones. What a
student's gradient is replayed from goes with the videos.
"""

from collections.abc import Mapping
from typing import Literal

import ray
import torch
from ray import ObjectRef
from torch import Tensor

from model.backbone import Backbone, Prepared
from model.families import prepared
from model.noise import SampleNoise
from model.replay import Tape
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from workers import build
from workers.actor import Rank, Stats
from workers.batch import Batch
from workers.model_directory import ModelDirectory
from workers.prompts import TrainingData
from workers.zero import DTYPES, device


class RolloutWorker(Rank):
    """One replica."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        data: TrainingData,
        rollout: RolloutConfig,
        dtype: Literal["fp32", "bf16"],
        compile: bool,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads)
        self.source, self.data = ModelDirectory(model, verified=True), data
        self.config, self.dtype, self.compile = rollout, dtype, compile

    @property
    def device(self) -> torch.device:
        return device()

    def start(self, address: str, port: int, timeout_s: float) -> None:
        """It joins nobody."""
        self.build()

    def build(self) -> None:
        self.network = build.whole(self.source, self.device, DTYPES[self.dtype])
        self.version: int | None = None
        """Student steps of the weights that it has; none until it was given any."""

    def forget(self) -> None:
        """Nothing is kept from one call to the next."""

    def take_weights(self, weights: Mapping[str, ObjectRef], version: int) -> None:
        """Have the student's weights after so many steps."""
        own = self.network.state_dict()
        for name, reference in weights.items():
            own[name].copy_(ray.get(reference))
        self.ready = prepared(self.network, compiled=self.compile, shared=True)
        self.version = version

    def rollout(self, plan: RolloutPlan, batch: Batch) -> tuple[Stats, Batch]:
        """A `video` [F, C, H, W] for each prompt embedding `context`, and where the plan carries a gradient
        what that is replayed from, `exits` and `seen`.

        RuntimeError where its weights are not those that the plan is for.
        """
        if plan.version != self.version:
            what = f"a rollout with weights {plan.version} was asked of a replica that has {self.version}"
            raise RuntimeError(f"{what}.")
        video, tape = roll_out(self.network, self.source, self.config, plan, batch, self.device, self.ready)
        columns = {"video": video}
        if plan.grad_frames:
            columns |= tape.columns()
        return {}, Batch(batch.samples, columns)


def roll_out(
    network: Backbone,
    source: ModelDirectory,
    config: RolloutConfig,
    plan: RolloutPlan,
    batch: Batch,
    device: torch.device,
    ready: Prepared | None,
) -> tuple[Tensor, Tape]:
    """Videos [B, F, C, H, W] of one rollout, and what it leaves; `ready` is the network prepared for it, if
    its weights are here."""
    shape = source.card.video
    given = batch["data_video"][:, : plan.given_frames] if plan.given_frames else None
    rollout = Rollout(
        config,
        plan,
        noise=SampleNoise([(*plan.noise, sample) for sample in batch.samples], device),
        cache=network.new_cache(config.context_window(), shape.height, shape.width, device),
        shape=(len(batch), shape.channels, shape.height, shape.width),
        initial=given,
    )
    chunks = list(generate(network, rollout, batch["context"], ready=ready, sharded=ready is None))
    return _last(source, torch.cat([*([] if given is None else [given]), *chunks], dim=1)), rollout.tape


def _last(source: ModelDirectory, video: Tensor) -> Tensor:
    """The frames of a video that scorers look at: the last ones, if it is longer than they are trained for.

    A latent video's first frame is special (a causal VAE makes it of one frame of pixels, and later ones of
    several), so the window's is made anew: decoded with its past, its last frame of pixels encoded as an
    image.
    """
    window = source.card.video.frames
    if video.shape[1] <= window:
        return video
    codec = source.card.video.make_codec()
    assert codec is not None, "the config asks for a codec where rollouts are longer than a video"
    past, rest = video[:, : 1 - window], video[:, 1 - window :]
    first = codec.encode(codec.decode(past.detach())[:, -1:])
    return torch.cat([first, rest], dim=1)
