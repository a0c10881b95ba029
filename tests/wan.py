"""Small models of the classes that a Wan pipeline is made of, in its layout, with random weights."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from model.families import shapes_of
from model.light_vae import TinyDecoder
from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig, WanTransformer
from tests.fixtures import PROMPTS, write_model
from workers.model_directory import TextConfig, VideoConfig

MEAN, DEVIATION = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 2.0, 1.1]
SIZES = TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_len=32, text_dim=16, freq_dim=32
)
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=3, window=9, sink=3, positions="relative")


def write_vae(path: Path) -> Path:
    """A VAE that makes 8 × 8 pixels and four frames of a latent."""
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, latents_mean=MEAN, latents_std=DEVIATION
    ).save_pretrained(path)
    return path


def write_light_decoder(path: Path, channels: int = 4) -> Path:
    """A light decoder of 8 × 8 pixels and four frames of a latent."""
    torch.manual_seed(2)
    weights = TinyDecoder(channels).state_dict()
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def write_umt5(path: Path, text_dim: int = SIZES.text_dim) -> Path:
    """A text encoder and its tokenizer, trained on the prompts of the tests."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(
        [*PROMPTS, "a café — naïve, “quoted” & 3 < 4", "overexposed, static, blurred details"] * 3, trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    fast = T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(path / "tokenizer")
    torch.manual_seed(1)
    sizes = {"d_model": text_dim, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    config = UMT5Config(**sizes, vocab_size=len(fast), pad_token_id=0)
    UMT5EncoderModel(config).eval().save_pretrained(path / "text_encoder")
    return path


def write_release(path: Path, pipeline: Path) -> None:
    """The text encoder of the folder `pipeline` and a VAE, as files of Wan's release; and the VAE of
    diffusers' class beside it."""
    outside = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    inside = {
        "0.layer_norm": "norm1",
        "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "1.layer_norm": "norm2",
        "1.DenseReluDense.wi_0": "ffn.gate.0",
        "1.DenseReluDense.wi_1": "ffn.fc1",
        "1.DenseReluDense.wo": "ffn.fc2",
    } | {f"0.SelfAttention.{part}": f"attn.{part}" for part in "qkvo"}
    text = {}
    for name, tensor in UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").state_dict().items():
        module = name.removesuffix(".weight")
        if match := re.match(r"encoder\.block\.(\d+)\.layer\.(.*)", module):
            text[f"blocks.{match[1]}.{inside[match[2]]}.weight"] = tensor
        elif module != "encoder.embed_tokens":  # which is the shared one
            text[f"{outside[module]}.weight"] = tensor
    shutil.copytree(pipeline / "tokenizer", path / "google" / "umt5-xxl")
    torch.save(text, path / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.manual_seed(4)
    vae = AutoencoderKLWan(base_dim=8)
    vae.save_pretrained(path / "beside")
    weights = {_of_release(name): tensor for name, tensor in vae.state_dict().items()}
    torch.save(weights, path / "Wan2.1_VAE.pth")


def _of_release(name: str) -> str:
    """The release's name of a weight of diffusers' VAE."""
    for theirs, own in {
        r"^quant_conv": "conv1",
        r"^post_quant_conv": "conv2",
        r"conv_in": "conv1",
        r"norm_out": "head.0",
        r"conv_out": "head.2",
        r"mid_block\.resnets\.0": "middle.0",
        r"mid_block\.attentions\.0": "middle.1",
        r"mid_block\.resnets\.1": "middle.2",
        r"down_blocks": "downsamples",
        r"(middle\.[02]|samples\.\d+|resnets\.\d+)\.norm1": r"\1.residual.0",
        r"(middle\.[02]|samples\.\d+|resnets\.\d+)\.conv1": r"\1.residual.2",
        r"(middle\.[02]|samples\.\d+|resnets\.\d+)\.norm2": r"\1.residual.3",
        r"(middle\.[02]|samples\.\d+|resnets\.\d+)\.conv2": r"\1.residual.6",
        r"conv_shortcut": "shortcut",
    }.items():
        name = re.sub(theirs, own, name)
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.(.*)", name):
        name = f"decoder.upsamples.{4 * int(match[1]) + int(match[2] or 3)}.{match[3]}"
    return name


def write_student(path: Path, pipeline: Path, *, seed: int = 3, fps: int = 16) -> Path:
    """A student that decodes by the VAE and reads prompts by the encoder in the folder `pipeline`."""
    video = VideoConfig(9, 4, 4, 6, codec="wan_vae", vae=str(pipeline / "vae"), fps=fps)
    write_model(path, SIZES, seed=seed, rollout=ROLLOUT, video=video, text=TextConfig("umt5", str(pipeline)))
    return path


def write_pipeline(path: Path) -> Path:
    """A folder with a VAE, a text encoder and its tokenizer."""
    write_vae(path / "vae")
    write_umt5(path)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return path


class Weights:
    """A `WeightSource` of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


class RandomWeights:
    """A `WeightSource` of weights in bf16 that are drawn when they are asked for, so that a model is never in
    memory."""

    def __init__(self, sizes: TransformerConfig):
        self.shapes = shapes_of(sizes)

    def keys(self) -> list[str]:
        return list(self.shapes)

    def get(self, name: str) -> Tensor:
        shape = torch.Size(self.shapes[name])
        scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
        drawn = (torch.rand(shape) - 0.5) * scale
        return (drawn + ("norm" in name)).bfloat16()


def network_of(sizes: TransformerConfig, weights: dict[str, Tensor]) -> WanTransformer:
    network = WanTransformer(sizes)
    network.load_state_dict(weights)
    return network


def inputs(sizes: TransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy video of three frames, timesteps and prompts, of two samples."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, sizes.in_dim, 8, 8, generator=generator)
    context = torch.randn(2, sizes.text_len, sizes.text_dim, generator=generator)
    return x, torch.tensor([900.0, 30.0]), context


def gap(a: Tensor, b: Tensor) -> float:
    """Relative error in norm."""
    return ((a - b).norm() / b.norm()).item()
