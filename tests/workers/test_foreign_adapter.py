"""Adapters in other tools' layouts are read under our names, or refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.transformer import TransformerConfig
from tests.fixtures import random_weights
from tests.wan import Weights, gap, inputs, network_of
from workers.foreign.adapter import ForeignAdapter, Merged, for_diffusers

SIZES = TransformerConfig(
    dim=48, ffn_dim=96, num_heads=4, num_layers=3, in_dim=4, out_dim=4, text_len=6, text_dim=20, freq_dim=64
)
TARGETS = ["q", "v", "ffn.0"]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SIZES, 1)


@pytest.fixture(scope="module")
def adapted(weights: dict[str, Tensor]) -> Any:
    """PEFT's own adapter of our network, with weights of which none is zero, and a scale that is not one."""
    model = get_peft_model(
        network_of(SIZES, weights), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.0)
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def of_peft(path: Path, adapted: Any) -> Path:
    adapted.save_pretrained(path)
    return path


def of_longlive(path: Path, adapted: Any) -> Path:
    """Whose rank is its alpha: the scale is in B."""
    body = {
        name: tensor * 1.5 if "lora_B" in name else tensor
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    torch.save({"generator_lora": body}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def of_trainers(path: Path, adapted: Any) -> Path:
    body: dict[str, Tensor] = {}
    for name, tensor in get_peft_model_state_dict(adapted).items():
        bare = name.replace("base_model.model.", "diffusion_model.")
        bare = bare.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        body[bare] = tensor.contiguous()
        body[f"{bare.partition('.lora_')[0]}.alpha"] = torch.tensor(6.0)
    save_file(body, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def of_diffusers(path: Path, adapted: Any) -> Path:
    save_file(for_diffusers(ForeignAdapter(of_peft(path, adapted))), path / "../lora.safetensors")
    return path.parent / "lora.safetensors"


@pytest.mark.parametrize("layout", [of_peft, of_longlive, of_trainers, of_diffusers])
@torch.no_grad()
def test_an_adapter_of_each_layout_merges(
    layout: Callable[[Path, Any], Path], weights: dict[str, Tensor], adapted: Any, tmp_path: Path
) -> None:
    source = Merged(Weights(weights), ForeignAdapter(layout(tmp_path / "adapter", adapted)))
    both = network_of(SIZES, {name: source.get(name) for name in source.keys()})  # noqa: SIM118
    x, timestep, context = inputs(SIZES)
    asked = adapted(x, timestep, context).velocity
    assert gap(both(x, timestep, context).velocity, asked) < 1e-5
    assert gap(network_of(SIZES, weights)(x, timestep, context).velocity, asked) > 1e-2


def test_an_adapter_that_is_none_is_refused(weights: dict[str, Tensor], adapted: Any, tmp_path: Path) -> None:
    tensors = load_file(of_peft(tmp_path / "adapter", adapted) / "adapter_model.safetensors")
    name = next(iter(tensors))
    for body, said in (
        (weights, "is no adapter of linear layers: it also has"),
        ({name: tensors[name]}, "has only one half of the adapters of"),
        ({each.replace("blocks.2", "blocks.9"): tensor for each, tensor in tensors.items()}, "does not have"),
    ):
        save_file(body, tmp_path / "it.safetensors")
        with pytest.raises(ValueError, match=said):
            Merged(Weights(weights), ForeignAdapter(tmp_path / "it.safetensors"))
