"""The moving-digits data: truthful prompts, a clean split, and Parquet that is reproducible and whole."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.digits.moving_digits import (
    DIRECTIONS,
    PROMPTS,
    expected_shift,
    make_prompt,
    parse_prompt,
    render,
    sample_videos,
    scans,
    write_dataset,
)
from workers.dataset import ParquetDataset


def test_forty_prompts_round_trip_and_others_are_refused() -> None:
    assert len(set(PROMPTS)) == 40 and "a seven drifting left" in PROMPTS
    assert all(make_prompt(*parse_prompt(prompt)) == prompt for prompt in PROMPTS)
    for wrong in (
        "",
        "a seven",
        "a seven drifting sideways",
        "a ten drifting left",
        "A seven drifting left ",
    ):
        with pytest.raises(ValueError, match="not of the form 'a seven drifting left'"):
            parse_prompt(wrong)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_render_moves_one_pixel_a_frame_and_wraps(direction: str) -> None:
    images, _ = scans("train")
    starts = np.random.default_rng(0).integers(16, size=(20, 2))
    videos = render(images[:20], [direction] * 20, starts, 20)
    assert videos.shape == (20, 20, 1, 16, 16) and videos.dtype == np.uint8
    for image, start, video in zip(images, starts, videos, strict=False):
        for frame in range(20):
            y, x = start + frame * np.array(expected_shift(direction))
            assert np.array_equal(np.roll(video[frame, 0], (-y, -x), axis=(0, 1))[:8, :8], image)
            assert video[frame].sum() == image.sum()


def test_held_out_scans_are_a_stratified_fifth_and_never_in_the_training_set() -> None:
    (train, train_digits), (held_out, held_out_digits) = scans("train"), scans("held_out")
    assert len(train) + len(held_out) == 1797
    share = np.bincount(held_out_digits) / (np.bincount(held_out_digits) + np.bincount(train_digits))
    assert np.all(np.abs(share - 0.2) < 0.01)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held_out}
    with pytest.raises(ValueError, match="train, held_out"):
        scans("test")


def test_every_prompt_is_as_frequent_as_every_other() -> None:
    counts = {prompt: 0 for prompt in PROMPTS}
    for _, digits, directions in sample_videos(videos=1200, frames=1, seed=1, split="held_out"):
        for digit, direction in zip(digits, directions, strict=True):
            counts[make_prompt(digit, direction)] += 1
    assert set(counts.values()) == {30}


def test_written_data_is_reproducible_whole_and_read_as_any_other(tmp_path: Path) -> None:
    wanted = dict(videos=9000, frames=3, seed=5, split="train")
    write_dataset(tmp_path / "one", **wanted)
    write_dataset(tmp_path / "two", **wanted)
    shards = sorted(file.name for file in (tmp_path / "one").glob("*.parquet"))
    assert shards == ["00000-of-00002.parquet", "00001-of-00002.parquet"]
    assert all((tmp_path / "one" / s).read_bytes() == (tmp_path / "two" / s).read_bytes() for s in shards)

    data = ParquetDataset(tmp_path / "one", ["prompt", "video", "digit", "direction"])
    assert len(data) == 9000
    expected = next(sample_videos(**wanted))
    for index in range(64):
        row = data.row(index)
        assert parse_prompt(row["prompt"]) == (row["digit"], row["direction"])
        pixels = (row["video"] + 1) * 127.5
        torch.testing.assert_close(pixels, torch.from_numpy(expected[0][index]).float(), atol=1e-4, rtol=0)

    write_dataset(tmp_path / "one", **wanted)  # the same data set again: nothing to do
    with pytest.raises(ValueError, match="is another data set"):
        write_dataset(tmp_path / "one", **{**wanted, "seed": 6})
    with pytest.raises(ValueError, match="frames is 0"):
        write_dataset(tmp_path / "three", **{**wanted, "frames": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
