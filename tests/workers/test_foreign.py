"""Checkpoints in other tools' layouts are read under our names, or refused in one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from model.transformer import TransformerConfig, WanTransformer, sinusoidal
from model.wan_names import from_diffusers, to_diffusers, unwrapped
from tests.fixtures import random_weights
from tests.wan import Weights, gap, inputs, network_of
from workers.foreign.checkpoint import ForeignCheckpoint, recognise
from workers.foreign.writer import diffusers_config, wan_config, write
from workers.model_directory import save

SIZES = TransformerConfig(
    dim=48, ffn_dim=96, num_heads=4, num_layers=3, in_dim=4, out_dim=4, text_len=6, text_dim=20, freq_dim=64
)
WIDE = TransformerConfig(
    dim=256, ffn_dim=64, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_len=512, text_dim=8, freq_dim=16
)
"""Heads of 128 channels, as every Wan model's."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SIZES, 1)


def same(source: ForeignCheckpoint, weights: dict[str, Tensor]) -> bool:
    return set(source.keys()) == set(weights) and all(
        torch.equal(source.get(name), tensor) for name, tensor in weights.items()
    )


def diffusers_model(sizes: TransformerConfig, weights: dict[str, Tensor]) -> WanTransformer3DModel:
    network = WanTransformer3DModel.from_config(diffusers_config(sizes))
    network.load_state_dict({to_diffusers(name): tensor for name, tensor in weights.items()})
    return network.eval()


@torch.no_grad()
def test_our_transformer_is_that_of_diffusers(weights: dict[str, Tensor]) -> None:
    x, timestep, context = inputs(SIZES)
    theirs = diffusers_model(SIZES, weights)(x.transpose(1, 2), timestep, context, return_dict=False)[0]
    assert gap(network_of(SIZES, weights)(x, timestep, context).velocity, theirs.transpose(1, 2)) < 1e-5


@torch.no_grad()
def test_in_bf16_it_is_as_near_to_fp32_as_diffusers_which_keeps_modulation_and_norms_there() -> None:
    sizes = replace(SIZES, dim=256, ffn_dim=512, num_layers=6, freq_dim=256)
    weights = random_weights(sizes, 1)
    for name, tensor in weights.items():
        scale = 0.3 if name.endswith("modulation") else tensor.shape[-1] ** -0.5
        weights[name] = (scale * tensor / tensor.std()).bfloat16().float() if tensor.ndim > 1 else tensor
    x, _, context = (each.bfloat16().float() for each in inputs(sizes))
    timestep = torch.tensor([700.0, 701.0])
    network, other = network_of(sizes, weights), diffusers_model(sizes, weights)
    exact = network(x, timestep, context).velocity
    with TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        other = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs = other(x.transpose(1, 2).bfloat16(), timestep, context.bfloat16(), return_dict=False)[0]
    ours = network.bfloat16()(x, timestep, context).velocity
    assert ours.dtype == torch.bfloat16
    assert gap(ours.float(), exact) < 1.1 * gap(theirs.transpose(1, 2).float(), exact) < 0.02
    embedded = network.time_embedding(sinusoidal(timestep, sizes.freq_dim))
    assert embedded.dtype == torch.float32


@pytest.mark.parametrize(
    "sizes",
    [
        dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
        dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    ],
    ids=["1.3B", "14B"],
)
def test_names_and_shapes_at_the_real_sizes(sizes: dict[str, int]) -> None:
    config = TransformerConfig(in_dim=16, out_dim=16, text_len=512, text_dim=4096, freq_dim=256, **sizes)
    with torch.device("meta"):
        own = WanTransformer(config).state_dict()
        theirs = WanTransformer3DModel.from_config(diffusers_config(config)).state_dict()
    assert {to_diffusers(name): tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert [from_diffusers(to_diffusers(name)) for name in own] == list(own)


@pytest.mark.parametrize("format", ["diffusers", "wan", "pt"])
def test_what_is_written_reads_the_same(
    format: Any, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.foreign.writer.SHARD_BYTES", 100_000)
    write(Weights(weights), SIZES, tmp_path, format, causal=False, dtype=None, save=save)
    place = tmp_path / "model.pt" if format == "pt" else tmp_path
    if format != "pt":
        shards = list(tmp_path.glob("*.safetensors"))
        assert len(list(tmp_path.glob(f"*-of-{len(shards):05d}.safetensors"))) == len(shards) > 2
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in shards}
        for path in (*shards, *tmp_path.glob("*.index.json")):  # what some copying tools leave
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    source = ForeignCheckpoint(place, heads=SIZES.num_heads, text_len=SIZES.text_len)
    assert source.sizes == SIZES and same(source, weights)
    if format == "diffusers":
        x, timestep, context = inputs(SIZES)
        with torch.no_grad():
            loaded = WanTransformer3DModel.from_pretrained(tmp_path)
            theirs = loaded(x.transpose(1, 2), timestep, context, return_dict=False)[0]
            ours = network_of(SIZES, weights)(x, timestep, context).velocity
            assert gap(ours, theirs.transpose(1, 2)) < 1e-5


def test_weights_are_written_in_another_type(weights: dict[str, Tensor], tmp_path: Path) -> None:
    write(Weights(weights), SIZES, tmp_path, "wan", causal=True, dtype="bf16", save=save)
    source = ForeignCheckpoint(tmp_path)
    assert source.causal and same(source, {name: tensor.bfloat16() for name, tensor in weights.items()})


def wan_folder(path: Path, weights: dict[str, Tensor]) -> Path:
    """As released: with a text encoder, a VAE and a tokenizer's folder beside the weights."""
    (path / "google").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(wan_config(SIZES, causal=False)))
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        torch.save({"other": torch.zeros(3)}, path / name)
    save_file(weights, path / "diffusion_pytorch_model.safetensors")
    return path


def wan_pth(path: Path, weights: dict[str, Tensor]) -> Path:
    wan_folder(path, weights)
    (path / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    for part, chosen in enumerate((names[::2], names[1::2])):
        torch.save({name: weights[name] for name in chosen}, path / f"shard-{part}.pth")
    return path


def pipeline_folder(path: Path, weights: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    diffusers_model(SIZES, weights).save_pretrained(path / "transformer", max_shard_size="50KB")
    return path


def pickled(body: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path, dict[str, Tensor]], Path]:
    def make(path: Path, weights: dict[str, Tensor]) -> Path:
        file = path.with_suffix(".pt")
        torch.save(body(weights), file)
        return file

    return make


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def wrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP around a compiled module with checkpointed blocks names them."""
    return {
        "model._fsdp_wrapped_module._orig_mod."
        + name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): tensor
        for name, tensor in weights.items()
    }


def broken(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 7) for name, tensor in weights.items()}


PUBLISHED: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "wan release": wan_folder,
    "wan release of .pth shards": wan_pth,
    "diffusers pipeline, sharded": pipeline_folder,
    "self forcing, averaged": pickled(
        lambda w: {
            "generator": under("model.", broken(w)),
            "generator_ema": under("model.", w),
            "critic": under("model.", broken(w)),
        }
    ),
    "ode-initialised": pickled(lambda w: {"generator": under("model.", w)}),
    "causvid": pickled(lambda w: {"generator": wrapped(w), "critic": under("model.", broken(w))}),
    "flat": pickled(lambda w: under("module.", w)),
    "diffusion_model": pickled(lambda w: {"state_dict": under("diffusion_model.", w)}),
    "old pickle": lambda path, w: _old(path.with_suffix(".pth"), w),
}


def _old(path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts_load(layout: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    place = PUBLISHED[layout](tmp_path / "published", weights)
    source = ForeignCheckpoint(place, heads=SIZES.num_heads, text_len=SIZES.text_len)
    assert source.sizes == SIZES and same(source, weights)


def test_a_part_is_chosen(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"generator": under("model.", broken(weights)), "critic": weights}, tmp_path / "all.pt")
    critic = ForeignCheckpoint(tmp_path / "all.pt", part="critic", heads=4)
    assert same(critic, weights) and critic.causal is False
    assert ForeignCheckpoint(tmp_path / "all.pt", heads=4).causal is None
    with pytest.raises(ValueError, match=r"has no part generator_ema; it has generator, critic\."):
        ForeignCheckpoint(tmp_path / "all.pt", part="generator_ema", heads=4)


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.1.ffn.0.weight",
        "module.model.blocks.1.ffn.0.weight",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.blocks.1._fsdp_wrapped_module.ffn.0.weight",
        "_orig_mod.module.blocks.1._checkpoint_wrapped_module.ffn._orig_mod.0.weight",
        "base_model.model.blocks.1.ffn.0.weight",
        "diffusion_model.blocks.1.ffn.0.weight",
    ],
)
def test_wrappers_leave_a_name(name: str) -> None:
    assert unwrapped(name) == "blocks.1.ffn.0.weight"


def test_heads_of_wan_s_width_need_no_word(tmp_path: Path) -> None:
    save_file(random_weights(WIDE, 1), tmp_path / "wan.safetensors")
    assert ForeignCheckpoint(tmp_path / "wan.safetensors").sizes == WIDE


def truncated(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights, path / "wan.safetensors")
    whole = (path / "wan.safetensors").read_bytes()
    (path / "wan.safetensors").write_bytes(whole[: len(whole) // 2])


def lying(weights: dict[str, Tensor], path: Path) -> None:
    (path / "wan.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def executing(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"generator": weights, "run": Path("x")}, path / "wan.pt")


def half(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path / "wan.pt")
    whole = (path / "wan.pt").read_bytes()
    (path / "wan.pt").write_bytes(whole[: len(whole) // 2])


def no_tensors(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"step": 3}, path / "wan.pt")


def a_list(weights: dict[str, Tensor], path: Path) -> None:
    torch.save([1, 2], path / "wan.pt")


def missing(weights: dict[str, Tensor], path: Path) -> None:
    save_file({n: t for n, t in weights.items() if not n.startswith("blocks.1.")}, path / "wan.safetensors")


def another_shape(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights | {"blocks.2.norm3.bias": torch.zeros(7)}, path / "wan.safetensors")


def unexpected(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights | {"vace_blocks.0.before_proj.weight": torch.zeros(7)}, path / "wan.safetensors")


def images(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights | {"img_emb.proj.0.weight": torch.zeros(7)}, path / "wan.safetensors")


def wider(weights: dict[str, Tensor], path: Path) -> None:
    wide = weights["patch_embedding.weight"].repeat(1, 2, 1, 1, 1)
    save_file(weights | {"patch_embedding.weight": wide}, path / "wan.safetensors")


def another_network(weights: dict[str, Tensor], path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(3)}, path / "wan.safetensors")


def missing_shard(weights: dict[str, Tensor], path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors"}}
    (path / "x.safetensors.index.json").write_text(json.dumps(index))


def another_class(weights: dict[str, Tensor], path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"_class_name": "WanVACETransformer3DModel"}))


def no_json(weights: dict[str, Tensor], path: Path) -> None:
    (path / "config.json").write_text("{")


def nothing(weights: dict[str, Tensor], path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is damaged, or no safetensors file"),
        (lying, "is damaged, or no safetensors file"),
        (executing, "holds more than tensors, which would have to be executed"),
        (half, "is damaged"),
        (no_tensors, "holds no tensors"),
        (a_list, "holds a list and no tensors by name"),
        (missing, r"missing blocks\.1\.cross_attn\.k\.bias, .* … \(27 in all\)"),
        (another_shape, r"of another shape blocks\.2\.norm3\.bias \[7\] instead of \[48\]"),
        (unexpected, r"unexpected vace_blocks\.0\.before_proj\.weight"),
        (images, r"conditioned on images \(it has img_emb\.proj\.0\.weight\)"),
        (wider, r"conditioned on images \(it reads 8 latent channels\)"),
        (another_network, r"holds no Wan transformer: .* is not among its 1 tensors \(conv_in\.weight\)"),
        (
            missing_shard,
            r"is incomplete: x\.safetensors\.index\.json names one\.safetensors, which is missing",
        ),
        (another_class, "is a folder of WanVACETransformer3DModel"),
        (no_json, r"config\.json cannot be read"),
        (nothing, "there is no checkpoint"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    damage: Callable[[dict[str, Tensor], Path], None], said: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    damage(weights, tmp_path)
    files = [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".safetensors")]
    with pytest.raises(ValueError, match=said) as caught:
        ForeignCheckpoint(files[0] if files else tmp_path, heads=4)
    assert "\n" not in str(caught.value)


def test_heads_that_nothing_says_are_asked_for(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match=r"does not say how many attention heads it has.*--heads"):
        ForeignCheckpoint(tmp_path / "wan.safetensors")


def test_what_is_ours_or_nothing_is_not_another_tool_s(tmp_path: Path) -> None:
    assert recognise(tmp_path) is None and recognise(tmp_path / "none") is None
    (tmp_path / "model.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "transformer-00000.safetensors")
    assert recognise(tmp_path) is None
