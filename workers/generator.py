"""A model on one device that makes videos, for the command line and for evaluation.

A student generates through the one rollout, with the window, positions and context noise that its checkpoint
says; a teacher by integrating its ODE over the trained length.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from model.backbone import velocity_of
from model.codec import Codec
from model.families import prepared
from model.noise import Key, SampleNoise
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutPlan
from model.sampler import guided, integrate
from workers.build import whole
from workers.model_directory import ModelDirectory, showable


class Generator:
    """A model on one device that makes videos."""

    def __init__(self, model: str, threads: int = 1, *, light_decoder: str | None = None):
        """ValueError where there is no such model, or the light decoder is none of its latents."""
        torch.set_num_threads(threads)
        self.source = ModelDirectory(model)
        self.card = self.source.card
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = whole(self.source, self.device)
        self.ready = prepared(self.model, shared=True) if self.card.rollout else None
        self.text = self.source.text_encoder(self.device)
        self.codec = self.card.video.shown_by(light_decoder)

    def frames_of_chunks(self, frames: int, given: int = 0) -> int:
        """At least `frames` latent frames; those that are not given come in whole chunks of the student."""
        chunk = self.card.rollout.chunk if self.card.rollout else 1
        return given - (given - frames) // chunk * chunk

    @torch.no_grad()
    def student(
        self,
        prompts: Sequence[str],
        noise: Sequence[Key],
        frames: int,
        initial: Tensor | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        """Latent videos [B, frames, C, H, W] by rollout, one prompt and one noise key a video.

        `initial` latents [B, f, C, H, W] start the videos, and are part of them. A student that generates
        with guidance runs each row twice, the second time with `negative_prompt`.
        """
        config, video = self.card.rollout, self.card.video
        if config is None:
            raise ValueError(f"the model at {self.source.path} is a teacher; streaming needs a student.")
        count, twins = len(prompts), 2 if self.card.guidance else 1
        prompts = [*prompts, *[negative_prompt] * (count * (twins - 1))]
        if initial is not None:
            initial = initial.to(self.device).repeat(twins, 1, 1, 1, 1)
        cache = self.model.new_slots(
            config.context_window(),
            video.height,
            video.width,
            rows=len(prompts),
            chunk=config.chunk,
            capacity=frames,
            device=self.device,
        )
        rollout = Rollout(
            config,
            RolloutPlan.full(config, frames),
            noise=SampleNoise(list(noise) * twins, self.device),
            cache=cache,
            shape=(len(prompts), video.channels, video.height, video.width),
            initial=initial,
        )
        context = self.text.encode(prompts)
        chunks = generate(self.model, rollout, context, guidance=self.card.guidance, ready=self.ready)
        whole = [*([] if initial is None else [initial]), *chunks]
        return torch.cat([chunk[:count].cpu() for chunk in whole], dim=1)

    @torch.no_grad()
    def teacher(
        self,
        prompts: Sequence[str],
        noise: Sequence[Key],
        *,
        steps: int,
        guidance: float,
        negative_prompt: str = "",
    ) -> Tensor:
        """Latent videos [B, F, C, H, W] of the trained length by Euler's method with guidance."""
        x = SampleNoise(noise, self.device).draw((len(prompts), *self.card.video.shape), 0, 0)
        velocity = partial(
            guided,
            partial(velocity_of, self.model),
            cond=self.text.encode(prompts),
            uncond=self.text.encode([negative_prompt]),
            guidance=guidance,
        )
        path = integrate(velocity, x, shift=self.card.shift, grid=torch.linspace(1000, 0, steps + 1).tolist())
        return path[-1].cpu()

    @property
    def shown(self) -> Codec:
        """What makes frames of latents; ValueError where the model has no codec."""
        return showable(self.codec, self.source.path)
