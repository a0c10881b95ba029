"""The Wan VAE as a codec: diffusers' own numbers, whole or chunk by chunk."""

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from model.wan_vae import WanVae, copy_vae
from tests.wan import DEVIATION, MEAN, gap, write_pipeline, write_release, write_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_vae(tmp_path_factory.mktemp("vae")))


def latents(frames: int, seed: int = 1) -> Tensor:
    return torch.randn(frames, 4, 4, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_numbers_are_those_of_diffusers(folder: str) -> None:
    codec, vae = WanVae(folder), AutoencoderKLWan.from_pretrained(folder).eval()
    mean, deviation = (torch.tensor(each).view(1, 4, 1, 1, 1) for each in (MEAN, DEVIATION))
    z = latents(5)[None]
    theirs = vae.decode(z.transpose(1, 2) * deviation + mean).sample.transpose(1, 2)
    ours = codec.decode(z)
    assert ours.shape == theirs.shape == (1, *codec.shape((5, 4, 4, 6))) == (1, 17, 3, 32, 48)
    assert gap(ours, theirs) < 1e-5
    assert codec.unclamped(10 * z).abs().max() > 1 >= codec.decode(10 * z).abs().max()

    pixels = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded = (vae.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / deviation
    assert gap(codec.encode(pixels), encoded.transpose(1, 2)) < 1e-5
    for count in (1, 5, 81):
        assert codec.frames(codec.latents(count)) == count
    assert [codec.latents(count) for count in (0, 1, 2, 5, 6, 81)] == [0, 1, 2, 2, 3, 21]
    with pytest.raises(ValueError, match=r"encodes 1 \+ 4 k frames, not 8; use 5 or 9\."):
        codec.encode(pixels[:, :8])


@pytest.mark.parametrize("chunks", [[3, 3, 3], [1] * 9, [2, 4, 3], [9]], ids=str)
def test_chunk_by_chunk_is_the_whole(folder: str, chunks: list[int]) -> None:
    codec = WanVae(folder)
    video, other = latents(9), latents(9, seed=3)
    whole = codec.decode(video[None])[0]
    stream, another, parts = codec.stream(), codec.stream(), []
    for part, beside in zip(video.split(chunks), other.split(chunks), strict=True):
        another.decode(beside)  # streams do not know of each other
        parts.append(stream.decode(part))
        stream = pickle.loads(pickle.dumps(stream))  # as a stream that is parked
        stream.to("cpu")
    assert [len(part) for part in parts] == [
        codec.frames(sum(chunks[: i + 1])) - codec.frames(sum(chunks[:i])) for i in range(len(chunks))
    ]
    assert gap(torch.cat(parts), whole) < 1e-5


def test_what_a_stream_remembers_follows_from_its_last_latents(folder: str) -> None:
    codec = WanVae(folder)
    reach = codec.receptive
    assert reach == 30
    video = latents(reach + 8)
    whole = codec.decode(video[None])[0]
    for kept, near in ((reach, True), (6, False)):
        stream = codec.stream()
        stream.rebuild(video[-3 - kept : -3])
        assert (gap(stream.decode(video[-3:]), whole[-12:]) < 1e-5) == near


def test_one_encoder_is_known_by_its_files(folder: str, tmp_path: Path) -> None:
    digest = WanVae(folder).digest()
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert WanVae(str(tmp_path)).digest() == digest
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    other = tmp_path.rename(tmp_path.parent / "other")
    assert WanVae(str(other)).digest() != digest


def test_the_releases_file_is_read(tmp_path: Path) -> None:
    write_release(tmp_path, write_pipeline(tmp_path / "pipeline"))
    released, ours = WanVae(str(tmp_path)), WanVae(str(tmp_path / "beside"))
    z = torch.randn(1, 3, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(released.decode(z), ours.decode(z))
    frames = ours.decode(z)
    assert torch.equal(released.encode(frames), ours.encode(frames))
    for name in ("channels", "spatial", "temporal", "receptive"):
        assert getattr(released, name) == getattr(ours, name)
    (tmp_path / "copy").mkdir()
    copy_vae(str(tmp_path), tmp_path / "copy" / "vae")
    assert WanVae(str(tmp_path / "copy")).digest() == released.digest() != ours.digest()
    (tmp_path / "cut").mkdir()
    for content in (Path(tmp_path, "Wan2.1_VAE.pth").read_bytes()[:5000], pickle.dumps(print), b""):
        (tmp_path / "cut" / "Wan2.1_VAE.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"the VAE at .*Wan2\.1_VAE\.pth cannot be loaded"):
            WanVae(str(tmp_path / "cut")).decode(z)
    torch.save({"a": torch.zeros(1)}, tmp_path / "cut" / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="cannot be loaded"):
        WanVae(str(tmp_path / "cut")).decode(z)


def test_what_is_no_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no VAE at"):
        WanVae(str(tmp_path)).shape((1, 4, 2, 2))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match=r"is no VAE of Wan 2\.1"):
        WanVae(str(tmp_path)).shape((1, 4, 2, 2))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match=r"is no VAE of Wan 2\.1"):
        WanVae(str(tmp_path)).shape((1, 4, 2, 2))
    folder = write_vae(tmp_path / "vae")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the VAE at .* cannot be loaded"):
        WanVae(str(folder)).encode(torch.zeros(1, 1, 3, 8, 8))
