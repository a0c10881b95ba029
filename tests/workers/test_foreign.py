"""Checkpoints in other tools' layouts are read under our names, or refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.transformer import TransformerConfig, WanTransformer
from model.wan_names import from_diffusers, to_diffusers, unwrapped
from tests.fixtures import random_weights
from workers.foreign.adapter import ForeignAdapter, Merged, for_diffusers
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


def inputs(sizes: TransformerConfig, frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, frames, sizes.in_dim, 8, 8, generator=generator)
    context = torch.randn(2, sizes.text_len, sizes.text_dim, generator=generator)
    return x, torch.tensor([900.0, 30.0]), context


def diffusers_model(sizes: TransformerConfig, weights: dict[str, Tensor]) -> WanTransformer3DModel:
    network = WanTransformer3DModel.from_config(diffusers_config(sizes))
    network.load_state_dict({to_diffusers(name): tensor for name, tensor in weights.items()})
    return network.eval()


def ours(sizes: TransformerConfig, weights: dict[str, Tensor]) -> WanTransformer:
    network = WanTransformer(sizes)
    network.load_state_dict(weights)
    return network


def gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_our_transformer_is_that_of_diffusers(weights: dict[str, Tensor]) -> None:
    x, timestep, context = inputs(SIZES)
    theirs = diffusers_model(SIZES, weights)(x.transpose(1, 2), timestep, context, return_dict=False)[0]
    assert gap(ours(SIZES, weights)(x, timestep, context).velocity, theirs.transpose(1, 2)) < 1e-5


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
    source = ForeignCheckpoint(place, heads=SIZES.num_heads, text_len=SIZES.text_len)
    assert source.sizes == SIZES and same(source, weights)
    if format == "diffusers":
        x, timestep, context = inputs(SIZES)
        with torch.no_grad():
            loaded = WanTransformer3DModel.from_pretrained(tmp_path)
            theirs = loaded(x.transpose(1, 2), timestep, context, return_dict=False)[0]
            assert gap(ours(SIZES, weights)(x, timestep, context).velocity, theirs.transpose(1, 2)) < 1e-5


def test_weights_are_written_in_another_type(weights: dict[str, Tensor], tmp_path: Path) -> None:
    write(Weights(weights), SIZES, tmp_path, "wan", causal=True, dtype="bf16", save=save)
    source = ForeignCheckpoint(tmp_path)
    assert source.causal and same(source, {name: tensor.bfloat16() for name, tensor in weights.items()})


class Weights:
    """A `WeightSource` of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


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


TARGETS = ["q", "v", "ffn.0"]


@pytest.fixture(scope="module")
def adapted(weights: dict[str, Tensor]) -> Any:
    """PEFT's own adapter of our network, with weights of which none is zero, and a scale that is not one."""
    model = get_peft_model(
        ours(SIZES, weights), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.0)
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
    both = ours(SIZES, {name: source.get(name) for name in source.keys()})  # noqa: SIM118
    x, timestep, context = inputs(SIZES)
    asked = adapted(x, timestep, context).velocity
    assert gap(both(x, timestep, context).velocity, asked) < 1e-5
    assert gap(ours(SIZES, weights)(x, timestep, context).velocity, asked) > 1e-2


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
