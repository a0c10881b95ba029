"""diffusers' own pipeline, given what we export, makes what we make."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from model.adapters import AdapterConfig, adapt, peft_layout
from model.backbone import velocity_of
from model.noise import SampleNoise
from model.sampler import guided, integrate
from model.transformer import TransformerConfig, WanTransformer
from tests.fixtures import random_weights, write_model
from tests.wan import gap, network_of
from workers.foreign.adapter import DIFFUSERS_FILE, ForeignAdapter, for_diffusers
from workers.foreign.writer import write
from workers.model_directory import ModelDirectory, TextConfig, VideoConfig, save

pytestmark = pytest.mark.slow
SIZES = TransformerConfig(
    dim=48, ffn_dim=96, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_len=6, text_dim=20, freq_dim=64
)
STEPS, SHIFT, GUIDANCE, FRAMES = 10, 5.0, 3.0, 3


class OurGrid(FlowMatchEulerDiscreteScheduler):
    """Timesteps evenly spaced before the warp, as ours, where diffusers warps its ends twice."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(sigmas=sigmas, device=device)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_model(
        tmp_path / "model",
        SIZES,
        seed=1,
        video=VideoConfig(FRAMES, codec="none"),
        text=TextConfig("embedded"),
    )
    source = ModelDirectory(tmp_path / "model")
    (tmp_path / "exported").mkdir()
    write(source, SIZES, tmp_path / "exported", "diffusers", causal=False, dtype=None, save=save)
    return tmp_path / "exported"


@pytest.fixture
def pipeline(exported: Path) -> WanPipeline:
    made = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=OurGrid(shift=SHIFT),
        transformer=WanTransformer3DModel.from_pretrained(exported),
    )
    made.set_progress_bar_config(disable=True)
    return made


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    cond = torch.randn(2, SIZES.text_len, SIZES.text_dim, generator=generator)
    uncond = torch.randn(1, SIZES.text_len, SIZES.text_dim, generator=generator)
    noise = SampleNoise([(0, "pipeline", i) for i in range(2)]).draw((2, FRAMES, 4, 8, 8), 0, 0)
    return cond, uncond, noise


def theirs(pipeline: WanPipeline) -> Tensor:
    cond, uncond, noise = prompts()
    made = pipeline(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond.expand_as(cond),
        latents=noise.transpose(1, 2),
        num_frames=1 + 4 * (FRAMES - 1),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=1 + GUIDANCE,
        output_type="latent",
        return_dict=False,
    )
    return made[0].transpose(1, 2)


def ours(network: WanTransformer) -> Tensor:
    cond, uncond, noise = prompts()
    velocity = partial(
        guided, partial(velocity_of, network.eval()), cond=cond, uncond=uncond, guidance=GUIDANCE
    )
    return integrate(velocity, noise, shift=SHIFT, grid=torch.linspace(1000, 0, STEPS + 1).tolist())[-1]


def test_many_steps_with_guidance_are_those_of_the_pipeline(pipeline: WanPipeline) -> None:
    network = network_of(SIZES, random_weights(SIZES, 1))
    assert gap(ours(network), theirs(pipeline)) < 1e-4


def test_the_pipeline_takes_our_adapter(pipeline: WanPipeline, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=6)
    adapted = adapt(network_of(SIZES, random_weights(SIZES, 1)), config)
    generator = torch.Generator().manual_seed(5)
    learned = {
        name: 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    adapted.load_state_dict(random_weights(SIZES, 1) | learned)
    tensors, settings = peft_layout(learned, config, "base")
    (tmp_path / "adapter").mkdir()
    save(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "lora").mkdir()
    save(for_diffusers(ForeignAdapter(tmp_path / "adapter")), tmp_path / "lora" / DIFFUSERS_FILE)

    without = theirs(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        assert gap(ours(adapted), theirs(pipeline)) < 1e-4
        assert gap(without, theirs(pipeline)) > 1e-2
