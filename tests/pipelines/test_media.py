"""Files of videos and images: what a viewer sees, and what is left where a file cannot be written."""

import errno
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from pipelines import cli
from pipelines.media import contact_sheet, grid, read_image, write_video
from tests.fixtures import write_model

SIZES = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1, text_len=8, text_dim=16, freq_dim=32)
FRAMES = torch.linspace(-1, 1, 24)[:, None, None, None].expand(24, 1, 8, 8)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "student"
    write_model(path, SIZES, seed=1, rollout=RolloutConfig(chunk=3, window=6, positions="relative"))
    return path


@pytest.mark.parametrize(("fps", "seconds"), [(8, 3.0), (24, 1.0), (7, 24 / 7), (10, 2.4)])
def test_a_gif_plays_at_its_rate(tmp_path: Path, fps: int, seconds: float) -> None:
    write_video(tmp_path / "video.gif", FRAMES, fps)
    with Image.open(tmp_path / "video.gif") as file:
        shown = []
        for frame in range(file.n_frames):
            file.seek(frame)
            shown.append(file.info["duration"])
    assert sum(shown) == pytest.approx(1000 * seconds, abs=5) and len(shown) == 24
    assert max(shown) - min(shown) <= 10


def test_an_mp4_holds_every_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "deep" / "video.mp4", FRAMES, 8)
    with av.open(tmp_path / "deep" / "video.mp4") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8 and len(list(container.decode(stream))) == 24


def test_samples_of_any_size_make_a_sheet_that_can_be_looked_at(tmp_path: Path) -> None:
    large = np.arange(81, dtype=np.uint8)[:, None, None, None].repeat(480, 1).repeat(832, 2).repeat(3, 3)
    contact_sheet(tmp_path / "large.png", [large, large])
    with Image.open(tmp_path / "large.png") as sheet:
        assert sheet.size == (24 * (96 * 832 // 480), 2 * 96)
        assert sheet.getpixel((0, 0)) == (0, 0, 0) and sheet.getpixel((sheet.width - 1, 0)) == (80, 80, 80)
    small = np.zeros((6, 16, 16, 3), np.uint8)
    contact_sheet(tmp_path / "small.png", [small])
    with Image.open(tmp_path / "small.png") as sheet:
        assert sheet.size == (6 * 96, 96)
    for count, shape in ((8, (6, 32, 64, 3)), (6, (6, 32, 48, 3)), (7, (6, 112, 16, 3))):
        assert grid([small + number for number in range(count)]).shape == shape
    assert grid([small + number for number in range(8)])[0, 20, 20, 0] == 5  # the second of the second row


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_full_or_read_only_disk_is_one_sentence_and_leaves_nothing(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    problem: int,
    suffix: str,
) -> None:
    def fails(*_: object) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(os, "fsync", fails)
    output = tmp_path / f"video.{suffix}"
    words = [
        "generate",
        "--model",
        str(student),
        "--prompt",
        "a two",
        "--frames",
        "3",
        "--output",
        str(output),
    ]
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"{output} cannot be written: {os.strerror(problem).lower()}" in said
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.mp4").mkdir()
    for output, says in (
        ("file/video.mp4", "is no directory"),
        ("directory.mp4", "is a directory; name a file"),
    ):
        words = ["generate", "--model", "none", "--prompt", "a two", "--output", str(tmp_path / output)]
        assert cli.main(words) == 2
        said = capfd.readouterr().err
        assert says in said and said.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["directory.mp4", "file"]


def test_a_photo_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    image = np.zeros((8, 8), np.uint8)
    image[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to see it
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    frame = read_image(tmp_path / "turned.png", (1, 8, 8))
    assert (frame[0, :, :4] == -1).all() and (frame[0, :, 4:] == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, channels: int) -> None:
    greys = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "deep.png")
    frame = read_image(tmp_path / "deep.png", (channels, 8, 8))
    expected = torch.from_numpy(greys / 32767.5 - 1).float().expand(channels, 8, 8)
    assert (frame - expected).abs().max() < 1 / 127


def test_an_image_needs_a_student_that_takes_one(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    words = ["generate", "--model", str(student), "--prompt", "a two", "--output", str(tmp_path / "a.mp4")]
    assert cli.main([*words, "--image", str(tmp_path / "image.png")]) == 2
    said = capfd.readouterr().err
    assert "was not trained to go on from an image" in said and "distill.given_frames" in said
    assert cli.main([*words, "--image", str(tmp_path / "none.png")]) == 2
    assert "--image: there is no file" in capfd.readouterr().err


def test_a_long_prompt_is_not_echoed(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for prompt in ("a two " * 2000, "a" * 10000):
        words = ["generate", "--model", str(student), "--prompt", prompt, "--output", str(tmp_path / "a.mp4")]
        assert cli.main(words) == 2
        said = capfd.readouterr().err
        assert "shorten it" in said and len(said) < 300
