"""Our models in other tools' layouts: a diffusers folder, one of Wan's release, or a published `.pt`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.backbone import WeightSource
from model.transformer import TransformerConfig
from model.wan_names import to_diffusers
from workers.foreign.files import PICKLES
from workers.zero import DTYPES

Format = Literal["diffusers", "wan", "pt"]
SHARD_BYTES = 4 * 2**30
STEM = "diffusion_pytorch_model"


def diffusers_config(sizes: TransformerConfig) -> dict[str, Any]:
    """`config.json` of a `WanTransformer3DModel`; ValueError for sizes that it cannot have."""
    if not (sizes.qk_norm and sizes.cross_attn_norm):
        raise ValueError(
            "diffusers' WanTransformer3DModel always norms queries and keys, and before the cross-attention; "
            "this model does not."
        )
    return {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": sizes.head_dim,
        "cross_attn_norm": True,
        "eps": sizes.eps,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_channels": sizes.in_dim,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "out_channels": sizes.out_dim,
        "patch_size": list(sizes.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": sizes.text_dim,
    }


def wan_config(sizes: TransformerConfig, *, causal: bool) -> dict[str, Any]:
    """`config.json` of a Wan 2.1 release folder."""
    return {
        "_class_name": "CausalWanModel" if causal else "WanModel",
        "model_type": "t2v",
        "dim": sizes.dim,
        "eps": sizes.eps,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_dim": sizes.in_dim,
        "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "out_dim": sizes.out_dim,
        "text_len": sizes.text_len,
    }


def write(
    weights: WeightSource,
    sizes: TransformerConfig,
    directory: Path,
    format: Format,
    *,
    causal: bool,
    dtype: Literal["fp32", "bf16"] | None,
    save: Callable[[dict[str, Tensor], Path], None],
) -> None:
    """Write a model into `directory` in the layout `format`.

    The folders are written in shards of 4 GiB, one in memory at a time; a `.pt` is one file and one mapping,
    so all of its weights are in memory: 57 GB for 14B in fp32.

    Args:
        dtype: what the weights are turned into; None keeps what they are.
        save: writes tensors as one safetensors file.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(DTYPES[dtype])

    if format == "pt":
        tensors = {f"model.{name}": cast(weights.get(name)) for name in sorted(weights.keys())}
        # Loaders ask for the one or the other; what is written is stored once.
        torch.save({"generator": tensors, "generator_ema": tensors}, directory / f"model{PICKLES[0]}")
        return
    rename = to_diffusers if format == "diffusers" else str
    config = diffusers_config(sizes) if format == "diffusers" else wan_config(sizes, causal=causal)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    # How many shards there will be is part of their names.
    total, index, written = 0, {}, []
    for count, shard in enumerate(
        _shards((rename(name), cast(weights.get(name))) for name in sorted(weights.keys()))
    ):
        path = directory / f"{STEM}-{count:05d}.safetensors"
        save(shard, path)
        total += sum(tensor.nbytes for tensor in shard.values())
        written.append((path, list(shard)))
    for number, (path, names) in enumerate(written, start=1):
        several = f"-{number:05d}-of-{len(written):05d}" if len(written) > 1 else ""
        final = path.rename(directory / f"{STEM}{several}.safetensors")
        index.update(dict.fromkeys(names, final.name))
    if len(written) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps(body, indent=1))


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    yield shard
