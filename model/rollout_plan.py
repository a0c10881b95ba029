"""How a student generates, and all that is random or variable in one rollout."""

from dataclasses import dataclass
from typing import Literal

from infra.settings import Invalid, at_least, positive
from model.kv_cache import Window
from model.noise import Key, integer, stratified


@dataclass(frozen=True)
class RolloutConfig:
    """How a student generates. It is a property of the trained weights and travels with every checkpoint."""

    shift: float = 5.0
    """Warp of the noise schedule; Wan uses 5."""
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    """Unwarped denoising timesteps, falling, in (0, 1000]."""
    chunk: int = 3
    """Latent frames denoised together; 1 is frame-wise."""
    window: int | None = None
    """Latent frames attended to in all: sink, latest, and the chunk. Null is all, for bounded videos only."""
    sink: int = 0
    """First frames that stay in the cache for ever."""
    positions: Literal["absolute", "relative"] = "absolute"
    """Rotary frame positions: of the video, as published, or of the window, for endless streams."""
    context_noise: Literal["nearest", "none"] = "nearest"
    """Noise on a chunk before it is cached: at the sigma nearest to timestep 0, as published, or none."""
    first_steps: tuple[float, ...] | None = None
    """Unwarped timesteps of the first chunk, which has no past to go by; null takes `steps`."""
    sampler: Literal["consistency", "ode"] = "consistency"
    """From step to step by noising the predicted x0 anew, as few-step students do, or along the ODE, for many
    steps."""

    def __post_init__(self) -> None:
        positive(self, "shift")
        at_least(self, 1, "chunk")
        for name, steps in (("steps", self.steps), ("first_steps", self.first_steps)):
            if steps is None:
                continue
            if not steps or list(steps) != sorted(set(steps), reverse=True):
                raise Invalid(name, f"{list(steps)} must fall strictly, for example [1000, 750, 500, 250].")
            if not all(0 < step <= 1000 for step in steps):
                raise Invalid(name, f"{list(steps)} must lie in (0, 1000].")
        at_least(self, 0, "sink")
        if self.window is not None and self.window < self.chunk + self.sink:
            raise Invalid(
                "window",
                f"of {self.window} frames is smaller than the chunk of {self.chunk} plus the sink of "
                f"{self.sink}; use at least {self.chunk + self.sink}.",
            )

    def check_frames(self, frames: int) -> None:
        """Raise unless chunks divide a video of `frames` latent frames."""
        if frames < 1 or frames % self.chunk:
            raise Invalid(
                "chunk",
                f"of {self.chunk} does not divide {frames} frames; "
                f"use {max(1, frames // self.chunk) * self.chunk} frames or another chunk.",
            )

    @property
    def every_step(self) -> tuple[float, ...]:
        """Unwarped timesteps at which any chunk is denoised, falling."""
        return tuple(sorted({*self.steps, *(self.first_steps or ())}, reverse=True))

    def steps_at(self, frame: int) -> tuple[float, ...]:
        """Unwarped timesteps of the chunk that starts at `frame`."""
        return self.first_steps if frame == 0 and self.first_steps is not None else self.steps

    def context_window(self) -> Window:
        return Window(self.window, self.sink, self.positions)


@dataclass(frozen=True)
class RolloutPlan:
    """All that is random or variable in a rollout; the coordinator derives it, so that ranks agree."""

    frames: int  # latent frames of the video, a given initial latent included
    exit_step: int  # index into the steps of the call whose x0 is the chunk, the same for every chunk
    noise: Key = ()  # what names the noise: (run seed, update, purpose); the sample index is appended
    grad_frames: int = 0
    """A chunk carries a gradient if its first frame is among the last `grad_frames` ones; 0 is none."""
    cache_gradient: Literal["constant", "released"] = "constant"
    """Cached keys and values are constants, or pass gradient on to their chunk's own call, as released."""
    first_exit_step: int | None = None  # the same for the first chunk where it has steps of its own
    given_frames: int = 0  # frames of the video that are given, not generated
    replayed: bool = False  # whether the gradient is that of a later replay, so that there is no graph
    version: int | None = None  # steps that the weights have made which it is for; None is whatever there is

    def exit_at(self, frame: int) -> int:
        """Index of the last step of the chunk that starts at `frame`."""
        return self.exit_step if frame > 0 or self.first_exit_step is None else self.first_exit_step

    @property
    def keeps_graph(self) -> bool:
        return self.grad_frames > 0 and not self.replayed

    @classmethod
    def draw(
        cls,
        config: RolloutConfig,
        frames: int,
        *,
        seed: int,
        update: int,
        purpose: str,
        grad_frames: int,
        cache_gradient: Literal["constant", "released"] = "constant",
        given_frames: int = 0,
        replayed: bool = False,
        group: int | None = None,
    ) -> "RolloutPlan":
        """A training plan: uniformly drawn exit steps, and gradient over the last `grad_frames` frames.

        The exit steps are an update's only ones, or those of a `group` of its samples, whose groups take
        every step once before one takes it again.
        """
        key = (seed, update, purpose)

        def drawn(steps: tuple[float, ...], name: str) -> int:
            if group is None:
                return integer(len(steps), *key, name)
            return stratified(group, len(steps), *key, name)

        exit_step = drawn(config.steps, "exit")
        first = config.first_steps
        first_exit = None if first is None else drawn(first, "first-exit")
        return cls(frames, exit_step, key, grad_frames, cache_gradient, first_exit, given_frames, replayed)

    @classmethod
    def full(
        cls, config: RolloutConfig, frames: int, *, seed: int = 0, given_frames: int = 0
    ) -> "RolloutPlan":
        """An inference plan: every step, no gradient."""
        first = None if config.first_steps is None else len(config.first_steps) - 1
        return cls(
            frames,
            len(config.steps) - 1,
            (seed, "generate"),
            first_exit_step=first,
            given_frames=given_frames,
        )
