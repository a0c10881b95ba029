"""The light decoder: its published layout, chunk by chunk, and what does not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.codec import SpaceToDepth
from model.light_vae import LightDecoder, TinyDecoder
from model.wan_vae import WanVae
from tests.wan import gap, write_light_decoder, write_vae
from workers.model_directory import VideoConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_vae(tmp_path_factory.mktemp("vae")))


def test_the_layout_is_the_published_one() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in TinyDecoder(16).state_dict().items()}
    blocks = [index + turn for index in (3, 9, 15) for turn in range(3)]
    own = {
        f"decoder.{index}.conv.{part}.{kind}"
        for index in blocks
        for part in (0, 2, 4)
        for kind in ("weight", "bias")
    }
    own |= {f"decoder.{index}.{kind}" for index in (1, 22) for kind in ("weight", "bias")}
    own |= {f"decoder.{index}.weight" for index in (8, 14, 20)}
    own |= {f"decoder.{index}.conv.weight" for index in (7, 13, 19)}
    assert shapes.keys() == own
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert shapes["decoder.9.conv.0.weight"] == (128, 256, 3, 3)
    assert [shapes[f"decoder.{index}.conv.weight"][0] for index in (7, 13, 19)] == [256, 256, 128]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_chunk_by_chunk_is_the_whole(vae: str, tmp_path: Path, suffix: str) -> None:
    codec = WanVae(vae)
    light = LightDecoder(codec, str(write_light_decoder(tmp_path / f"light.{suffix}")))
    latents = torch.randn(7, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = light.decode(latents[None])[0]
    assert whole.shape == codec.decode(latents[None])[0].shape == (25, 3, 32, 48)
    stream, parts = light.stream(), []
    for part in latents.split([3, 3, 1]):
        parts.append(stream.decode(part))
        stream.memory = pickle.loads(pickle.dumps(stream.memory))
        stream.to("cpu")
    assert [len(part) for part in parts] == [9, 12, 4]
    assert gap(torch.cat(parts), whole) < 1e-6
    # A frame depends on those before it and on none after it.
    changed = torch.cat([latents[:3], latents[3:] + 1])
    again = light.decode(changed[None])[0]
    assert torch.equal(again[:9], whole[:9]) and not torch.allclose(again[9:], whole[9:], atol=1e-4)


def test_a_stage_that_is_stored_as_growing_gives_its_last_frame(vae: str, tmp_path: Path) -> None:
    plain = write_light_decoder(tmp_path / "plain.pth")
    weights = torch.load(plain, weights_only=True)
    name = "decoder.7.conv.weight"
    torch.save({**weights, name: torch.cat([weights[name] + 1, weights[name]])}, tmp_path / "growing.pth")
    latents = torch.randn(1, 2, 4, 4, 6)
    one, other = (
        LightDecoder(WanVae(vae), str(path)).decode(latents) for path in (plain, tmp_path / "growing.pth")
    )
    assert torch.equal(one, other)


def test_what_does_not_fit_is_said(vae: str, tmp_path: Path) -> None:
    light = str(write_light_decoder(tmp_path / "light.pth"))
    with pytest.raises(ValueError, match="the model's codec does not"):
        LightDecoder(SpaceToDepth(), light)
    with pytest.raises(ValueError, match="reads latents of 16 channels, and the model's have 4"):
        VideoConfig(codec="wan_vae", vae=vae).shown_by(str(write_light_decoder(tmp_path / "16.pth", 16)))
    assert VideoConfig(channels=16, codec="none").shown_by(light) is None
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        LightDecoder(WanVae(vae), str(tmp_path / "nowhere.pth"))
    save_file({"decoder.1.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"decoder.1.weight": torch.zeros(256, 4, 1, 1)}, tmp_path / "less.pth")
    for name in ("other.safetensors", "text.pth", "less.pth"):
        with pytest.raises(ValueError, match="is no light decoder"):
            LightDecoder(WanVae(vae), str(tmp_path / name))
