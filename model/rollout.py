"""The self-rollout: a few-step student generates a video, chunk by chunk, on its own past.

This is algorithm 1 of Self Forcing (arXiv 2506.08009), written once, as a coroutine: it yields what it needs
(a `NetworkCall`), what it has made (a chunk) and where it may be changed (a `Boundary`), and is sent the
answers. The student's training step, the critic's data, evaluation and a viewer's stream all drive it.

For each chunk: denoise at `steps[0]`, …, `steps[exit_step]`, re-noising the predicted x0 between two steps;
only the call at `exit_step` carries a gradient, and its x0 is the chunk. Then one more call without gradient
writes the chunk's keys and values into the cache, which later chunks read as constants.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.settings import part
from model.backbone import Backbone, Output, Prepared
from model.families import prepared
from model.kv_cache import Cache, History, KeyValue
from model.noise import NoiseSource
from model.replay import Exit, Tape
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.sampler import euler_step, guide
from model.schedule import FlowSchedule, clean, interpolate


@dataclass(frozen=True)
class NetworkCall:
    """One forward of the student over one chunk."""

    x: Tensor  # the chunk as the network sees it, [B, f, C, H, W]
    timestep: float  # of all its frames, 0..1000
    history: History
    gradient: bool = False
    keeps_live: bool = False  # whether the call's keys and values are wanted


@dataclass(frozen=True)
class Boundary:
    """The pause between two chunks, where prompt and cache may change; True writes the cache anew."""


Steps = Generator[NetworkCall | Tensor | Boundary, Any, None]
"""A network call is sent (velocity, keys and values where it keeps them), a boundary a truth value, a chunk
nothing."""


class Rollout:
    """One batch's rollout, and where it stands."""

    pending: NetworkCall | Tensor | Boundary | None
    """What it waits for: a call's answer, a chunk [B, f, C, H, W] to be taken, the word to go on, or
    nothing."""

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
        with part("rollout"):
            config.check_frames(plan.frames - given)
        self.config = config
        self.plan = plan
        self.schedule = FlowSchedule(config.shift)
        self.noise = noise
        self.cache = cache
        self.shape = shape
        self.start = 0
        self.past: list[tuple[int, Tensor]] = []
        """Committed frames that the cache may still show, and the first one's place, for `reencode`."""
        self.tape = Tape()
        """What the gradient needs, where the plan says that it is replayed."""
        self._steps = self._chunks(initial)
        self.pending = next(self._steps)

    @property
    def between_chunks(self) -> bool:
        """Whether the next call is a chunk's first."""
        return isinstance(self.pending, Boundary)

    def send(self, answer: Any = None) -> None:
        """Answer what is pending (see `Steps`) and go on to what is pending next; None is the end."""
        try:
            self.pending = self._steps.send(answer)
        except StopIteration:
            self.pending = None

    def reencode(self) -> None:
        """Between two chunks: write the cache anew from the frames that it holds, for another prompt."""
        if not self.between_chunks:
            raise RuntimeError("the cache can be written anew between two chunks only.")
        self.send(True)

    def _chunks(self, initial: Tensor | None) -> Steps:
        """Algorithm 1."""
        config, plan, (batch, *frame) = self.config, self.plan, self.shape
        context_sigma = self.schedule.sigma(torch.tensor(0.0)).item()
        if initial is not None:
            yield from self._commit(initial, self.cache.history(initial.shape[1]))
            self._remember(initial)
        while True:
            while (yield Boundary()):
                yield from self._write_anew()
            exit_step = plan.exit_at(self.start)
            timesteps = self.schedule.few_steps(config.steps_at(self.start))
            sigmas = self.schedule.sigma(torch.tensor(timesteps)).tolist()
            history = self.cache.history(config.chunk)
            x = self._draw((batch, config.chunk, *frame), 0)
            for step in range(exit_step):
                velocity, _ = yield NetworkCall(x, timesteps[step], history)
                if config.sampler == "ode":
                    x = euler_step(x, velocity.float(), sigmas[step], sigmas[step + 1])
                else:
                    x0 = clean(x, velocity.float(), sigmas[step])
                    x = interpolate(x0, self._draw(x.shape, step + 1), sigmas[step + 1])
            carries = self.start >= plan.frames - plan.grad_frames
            if carries and plan.replayed:
                chunk = len(self.tape.seen)
                self.tape.exits.append(Exit(chunk, x, timesteps[exit_step], sigmas[exit_step]))
            gradient = carries and not plan.replayed
            released = gradient and plan.cache_gradient == "released"
            if gradient:
                # A graph keeps its history long after the chunk, so it gets one that holds no joined copies,
                # and those of the steps before it are let go.
                history = self.cache.history(config.chunk)
            velocity, live = yield NetworkCall(
                x, timesteps[exit_step], history, gradient=gradient, keeps_live=released
            )
            if gradient:
                history = self.cache.history(config.chunk)
            x0 = clean(x, velocity.float(), sigmas[exit_step])
            yield x0
            if self.start + config.chunk >= plan.frames:
                return
            context = x0.detach()
            if config.context_noise == "nearest":
                context = interpolate(context, self._draw(context.shape, exit_step + 1), context_sigma)
            yield from self._commit(context, history, live)
            self._remember(context)

    def _write_anew(self) -> Steps:
        """Re-encoding: the remembered frames, each at its place in the video, under the prompt of now."""
        self.cache.rewind()
        for first, frames in self.past:
            self.cache.skip_to(first)
            yield from self._commit(frames, self.cache.history(frames.shape[1]))

    def _commit(self, context: Tensor, history: History, exit_live: Sequence[KeyValue] = ()) -> Steps:
        _, live = yield NetworkCall(context, 0.0, history, keeps_live=True)
        if exit_live:
            # The value of the clean call with the graph of the call at `exit_step`, as released.
            with torch.enable_grad():
                live = [
                    (key + (exit_key - exit_key.detach()), value + (exit_value - exit_value.detach()))
                    for (key, value), (exit_key, exit_value) in zip(live, exit_live, strict=True)
                ]
        self.cache.commit(live, context.shape[1])

    def _draw(self, shape: Sequence[int], step: int) -> Tensor:
        return self.noise.draw(shape, self.start // self.config.chunk, step)

    def _remember(self, context: Tensor) -> None:
        """Move on, and keep what the cache may still show: few numbers beside their keys and values."""
        if self.plan.replayed:
            self.tape.seen.append(context)
        self.past.append((self.start, context))
        self.start += context.shape[1]
        sink, latest = self.config.context_window().kept(self.start, self.config.chunk)
        if sink + latest == self.start:
            return
        self.past = [
            (low, frames[:, low - first : high - first])
            for first, frames in self.past
            for low, high in (
                (first, min(sink, first + frames.shape[1])),
                (max(first, self.start - latest), first + frames.shape[1]),
            )
            if low < high
        ]


def generate(
    model: Backbone,
    rollout: Rollout,
    context: Tensor,
    *,
    guidance: float = 0.0,
    ready: Prepared | None = None,
    sharded: bool = False,
) -> Iterator[Tensor]:
    """Drive one rollout to its end, yielding each chunk [B, f, C, H, W] as it is finished.

    `context` is the prompt embedding [B, text_len, text_dim]. Gradients are enabled for the calls that the
    plan says, and for no other. With classifier-free `guidance` (see `guide`) the second half of the rows is
    the unconditional twin of the first: same noise, the negative prompt; both halves of a chunk are equal.
    `ready` is the model prepared for it, which else is done here, unless its weights are `sharded`: then the
    network itself is asked at every call.
    """
    if ready is None and not sharded:
        ready = prepared(model)
    answer = answering(model, ready, context, recorded=rollout.plan.keeps_graph)
    while (pending := rollout.pending) is not None:
        if isinstance(pending, Tensor):
            yield pending
        if not isinstance(pending, NetworkCall):
            rollout.send()
            continue
        velocity, live, *_ = answer(pending)
        if guidance:
            cond, uncond = velocity.chunk(2)
            velocity = guide(cond, uncond, guidance).repeat(2, 1, 1, 1, 1)
        rollout.send((velocity, live))


def answering(
    model: Backbone, ready: Prepared | None, context: Tensor, *, recorded: bool
) -> Callable[[NetworkCall], Output]:
    """What answers the calls of one rollout, the weights standing still.

    `recorded` says that some carry a gradient: else nothing of the rollout can be part of a graph later.
    """
    off = torch.no_grad if recorded else torch.inference_mode
    with off():
        prompts = None if ready is None else model.encode_context(context)

    def answer(call: NetworkCall) -> Output:
        how: dict[str, Any] = {"history": call.history, "return_live": call.keeps_live}
        if ready is not None and prompts is not None and not call.gradient:
            with off():
                return ready(call.x, [call.timestep] * len(call.x), prompts, **how)
        with torch.set_grad_enabled(call.gradient):
            timestep = torch.full((1,), call.timestep, device=call.x.device)
            return model(call.x, timestep, context, **how)

    return answer
