"""The self-rollout: a few-step student generates a video, chunk by chunk, on its own past.

This is algorithm 1 of Self Forcing (arXiv 2506.08009). There is one rollout. The student's training step,
the critic's data, evaluation and a viewer's stream all drive this step machine:

    state → the next network call → state

For each chunk: denoise at `steps[0]`, …, `steps[exit_step]`, re-noising the predicted x0 between two steps;
only the call at `exit_step` carries a gradient, and its x0 is the chunk. Then one more call without
gradient writes the chunk's keys and values into the cache, which later chunks read as constants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.kv_cache import Cache, History, KeyValue
from model.noise import NoiseSource
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.schedule import FlowSchedule, clean, interpolate
from model.score import guide


@dataclass(frozen=True)
class NetworkCall:
    """One forward of the student over one chunk."""

    x: Tensor
    """The chunk as the network sees it, [B, f, C, H, W]."""
    timestep: Tensor
    """[B, f]."""
    history: History
    gradient: bool
    keeps_live: bool
    """Whether the call's keys and values are wanted."""


class Rollout:
    """The state of one batch between two network calls."""

    def __init__(
        self,
        config: RolloutConfig,
        plan: RolloutPlan,
        *,
        noise: NoiseSource,
        cache: Cache,
        shape: tuple[int, int, int, int],
        initial: Tensor | None = None,
    ):
        """`shape` is (B, C, H, W); `initial` [B, f, C, H, W], clean, starts the video (image-to-video)."""
        for name, steps, index in (
            ("", config.steps, plan.exit_step),
            ("first_", config.first_steps, plan.first_exit_step),
        ):
            if steps is None or index is None:
                if steps is not index:
                    raise ValueError(f"{name}exit_step {index} does not go with rollout.{name}steps {steps}.")
            elif not 0 <= index < len(steps):
                raise ValueError(f"{name}exit_step {index} is beyond the {len(steps)} rollout.{name}steps.")
        given = 0 if initial is None else initial.shape[1]
        if config.window is not None and given > config.window:
            raise ValueError(
                f"an initial latent of {given} frames does not fit rollout.window of {config.window}."
            )
        config.check_frames(plan.frames - given)
        self.config = config
        self.plan = plan
        self.schedule = FlowSchedule(config.shift)
        self.context_sigma = self.schedule.sigma(torch.tensor(0.0)).item()
        self.noise = noise
        self.cache = cache
        self.shape = shape
        self.start = 0
        self.exit_step = plan.exit_step
        self.exit_live: list[KeyValue] | None = None
        self.past: list[tuple[int, Tensor]] = []
        self.replayed: int | None = None
        if initial is None:
            self._begin_chunk()
        else:
            self._begin_commit(initial, cache.history(initial.shape[1]))

    # Either denoising at `steps[self.step]`, or committing a finished chunk (`self.step` is None), perhaps one of the past again
    # (`self.replayed` is its place there).

    @property
    def between_chunks(self) -> bool:
        """Whether the next call is a chunk's first."""
        return self.step == 0

    def reencode(self) -> None:
        """Between two chunks: write the cache anew from the frames that it holds, for a prompt that has changed."""
        if not self.between_chunks:
            raise RuntimeError("the cache can be written anew between two chunks only.")
        self.cache.rewind()
        self._replay(0)

    def _replay(self, place: int) -> None:
        if place == len(self.past):
            self.replayed = None
            # The same noise as before, for it has the chunk's name; but another history.
            self._begin_chunk()
            return
        first, frames = self.past[place]
        self.replayed = place
        self.cache.skip_to(first)
        self._begin_commit(frames, self.cache.history(frames.shape[1]))

    def _begin_chunk(self) -> None:
        batch, *frame = self.shape
        self.step: int | None = 0
        first = self.plan.first_exit_step
        self.exit_step = first if self.start == 0 and first is not None else self.plan.exit_step
        self.timesteps = self.schedule.few_steps(self.config.steps_at(self.start))
        self.sigmas = self.schedule.sigma(torch.tensor(self.timesteps)).tolist()
        self.x = self._draw((batch, self.config.chunk, *frame), 0)
        self.history = self.cache.history(self.config.chunk)

    def _begin_commit(self, context: Tensor, history: History) -> None:
        self.step = None
        self.x = context
        self.history = history

    def _draw(self, shape: Sequence[int], step: int) -> Tensor:
        return self.noise.draw(shape, self.start // self.config.chunk, step)

    def next_call(self) -> NetworkCall | None:
        """What the network computes next; None once the video is whole (its last chunk needs no commit)."""
        end = self.start + (self.x.shape[1] if self.step is None and self.replayed is None else 0)
        if end >= self.plan.frames:
            return None
        timestep = 0.0 if self.step is None else self.timesteps[self.step]
        gradient = self.step == self.exit_step and self.start >= self.plan.frames - self.plan.grad_frames
        return NetworkCall(
            self.x,
            torch.full(self.x.shape[:2], timestep, device=self.x.device),
            # A graph keeps its history long after the chunk: one of its own, which holds no joined copies.
            self.cache.history(self.config.chunk) if gradient else self.history,
            gradient,
            self.step is None or (gradient and self.plan.cache_gradient == "released"),
        )

    def advance(self, velocity: Tensor, live: list[KeyValue] | None) -> Tensor | None:
        """Take the answer of `next_call`; returns the chunk [B, f, C, H, W] that it finished, if any."""
        if self.step is None:
            assert live is not None, "the call of a commit keeps its keys and values"
            self._commit(live)
            return None
        x0 = clean(self.x, velocity.float(), self.sigmas[self.step])
        if self.step < self.exit_step:
            sigma = self.sigmas[self.step]
            self.step += 1
            if self.config.sampler == "ode":
                self.x = self.x + (self.sigmas[self.step] - sigma) * velocity.float()
            else:
                self.x = interpolate(x0, self._draw(x0.shape, self.step), self.sigmas[self.step])
            return None
        context = x0.detach()
        if self.config.context_noise == "nearest":
            context = interpolate(context, self._draw(context.shape, self.step + 1), self.context_sigma)
        self.exit_live = live
        self._begin_commit(context, self.history)
        return x0

    def _commit(self, live: list[KeyValue]) -> None:
        if self.exit_live is not None:
            # The value of the clean call with the graph of the call at `exit_step`, as released.
            with torch.enable_grad():
                live = [
                    (key + (exit_key - exit_key.detach()), value + (exit_value - exit_value.detach()))
                    for (key, value), (exit_key, exit_value) in zip(live, self.exit_live, strict=True)
                ]
            self.exit_live = None
        frames = self.x.shape[1]
        self.cache.commit(live, frames)
        if self.replayed is not None:
            self._replay(self.replayed + 1)
            return
        self._remember(self.x)
        self.start += frames
        if self.start < self.plan.frames:
            self._begin_chunk()

    def _remember(self, context: Tensor) -> None:
        """Keep the committed frames that the cache may still show to a later chunk: few numbers beside their keys and values."""
        self.past.append((self.start, context))
        end = self.start + context.shape[1]
        sink, latest = self.config.context_window().kept(end, self.config.chunk)
        if sink + latest == end:
            return
        self.past = [
            (low, frames[:, low - first : high - first])
            for first, frames in self.past
            for low, high in (
                (first, min(sink, first + frames.shape[1])),
                (max(first, end - latest), first + frames.shape[1]),
            )
            if low < high
        ]


def generate(
    model: nn.Module, rollout: Rollout, context: Tensor, *, guidance: float = 0.0
) -> Iterator[Tensor]:
    """Drive one rollout to its end, yielding each chunk [B, f, C, H, W] as it is finished.

    `context` is the prompt embedding [B, text_len, text_dim]. Gradients are enabled for the calls that the
    plan says, and for no other. With classifier-free `guidance` (see `guide`) the second half of the rows
    is the unconditional twin of the first: same noise, the negative prompt; both halves of a chunk are equal.
    """
    while (call := rollout.next_call()) is not None:
        with torch.set_grad_enabled(call.gradient):
            answer = model(call.x, call.timestep, context, history=call.history, return_live=call.keeps_live)
            velocity, live = answer if call.keeps_live else (answer, None)
            if guidance:
                cond, uncond = velocity.chunk(2)
                velocity = guide(cond, uncond, guidance).repeat(2, 1, 1, 1, 1)
            chunk = rollout.advance(velocity, live)
        if chunk is not None:
            yield chunk
