"""Training inputs made from data instead of a rollout: teacher forcing and diffusion forcing.

Both show a whole video to the block-causal model in one forward, each chunk at a noise level of its own.
Under teacher forcing (Williams & Zipser 1989) a chunk's past is clean data; under diffusion forcing (Chen et
al., arXiv 2407.01392) it is the noisy video itself. Neither is what the model meets when it generates, which
is the exposure bias that Self Forcing removes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from infra.settings import part
from model.noise import Key, SampleNoise, generator
from model.rollout_plan import RolloutConfig
from model.schedule import FlowSchedule

Forcing = Literal["teacher_forcing", "diffusion_forcing"]
Module = Callable[..., Any]
"""A backbone, compiled perhaps: what answers an `Output`."""


def per_chunk(high: int, config: RolloutConfig, frames: int, keys: Sequence[Key]) -> Tensor:
    """Uniform integers in [0, high), one a chunk of each sample, repeated over its frames: [B, F]."""
    with part("rollout"):
        config.check_frames(frames)
    chunks = frames // config.chunk
    drawn = [torch.randint(high, (chunks,), generator=generator(*key, "chunk")) for key in keys]
    return torch.stack(drawn).repeat_interleave(config.chunk, dim=1)


def forced(
    module: Module,
    config: RolloutConfig,
    noisy: Tensor,
    timestep: Tensor,
    context: Tensor,
    clean: Tensor | None,
) -> Tensor:
    """Velocity of a noisy video at timesteps [B, F]; each chunk's past is `clean`, noisy where None."""
    window = config.context_window()
    return module(noisy, timestep, context, chunk=config.chunk, window=window, clean=clean).velocity


@dataclass(frozen=True)
class ForcedPlan:
    """All that is random when a few-step student predicts on data instead of its rollout."""

    forcing: Forcing
    noise: Key  # (run seed, update, purpose); the sample index is appended
    gradient: bool

    def predict(
        self, module: Module, config: RolloutConfig, data: Tensor, context: Tensor, samples: Sequence[int]
    ) -> Tensor:
        """x0 [B, F, C, H, W] of `data` noised to one of the student's own timesteps, drawn chunk by chunk.

        Under diffusion forcing clean is one of the levels, as in CausVid (arXiv 2412.07772): else the student
        would never see the clean past that it generates on.
        """
        keys = [(*self.noise, sample) for sample in samples]
        schedule, teacher = FlowSchedule(config.shift), self.forcing == "teacher_forcing"
        levels = torch.tensor([*schedule.few_steps(config.steps), *([] if teacher else [0.0])])
        timestep = levels[per_chunk(len(levels), config, data.shape[1], keys)].to(data.device)
        noise = SampleNoise(keys, data.device).draw(data.shape, 0, 0)
        noisy = schedule.add_noise(data, noise, timestep)
        with torch.set_grad_enabled(self.gradient):
            velocity = forced(module, config, noisy, timestep, context, data if teacher else None)
            return schedule.x0(velocity, noisy, timestep)
