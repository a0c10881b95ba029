"""Moving digits: real handwritten digits drift over a small wrapping canvas, as their prompts truthfully say.

The scans are scikit-learn's `load_digits` (1,797 of 8×8 pixels with values 0 to 16; Alpaydin and Kaynak, UCI,
1998). A fixed stratified fifth of them is held out and appears in evaluation videos only.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_digits

from infra import storage
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, is_there, tensor_fields

Direction = Literal["left", "right", "up", "down"]
Split = Literal["train", "held_out"]

CANVAS = 16
SCAN = 8
SPEED = 2
"""Pixels a frame. At one, what a frame tells of the sign of the motion hides in less than a token."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SHIFTS = {"left": (0, -SPEED), "right": (0, SPEED), "up": (-SPEED, 0), "down": (SPEED, 0)}
_PROMPT = re.compile(rf"an? ({'|'.join(DIGIT_WORDS)}) drifting ({'|'.join(DIRECTIONS)})")

_HELD_OUT = 0.2
_SPLIT_SEED = 20250609
_ROWS_PER_GROUP = 512
_GROUPS_PER_SHARD = 16


def make_prompt(digit: int, direction: Direction) -> str:
    """The prompt of `digit` (0..9) moving in `direction`, such as "a seven drifting left"."""
    article = "an" if digit == 8 else "a"
    return f"{article} {DIGIT_WORDS[digit]} drifting {direction}"


PROMPTS = tuple(make_prompt(digit, direction) for digit in range(10) for direction in DIRECTIONS)


def parse_prompt(prompt: str) -> tuple[int, Direction]:
    """The digit and direction that `prompt` names; ValueError unless it is like "a seven drifting left"."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(
            f"the prompt {shorten(prompt, 60)!r} is not of the form 'a seven drifting left', with a digit "
            f"from zero to nine and one of {', '.join(DIRECTIONS)}"
        )
    word, direction = match.groups()
    return DIGIT_WORDS.index(word), direction  # type: ignore[return-value]


def expected_shift(direction: Direction) -> tuple[int, int]:
    """Pixels `(dy, dx)` by which the content moves from one frame to the next; y grows down, x right."""
    return _SHIFTS[direction]


@lru_cache
def scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The scans of `split` as uint8 `[N, 8, 8]` in 0..255 (read-only), and their digits as int64 `[N]`.

    Both splits hold the same share of every digit, and the choice never changes.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    data = load_digits()
    generator = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(data.target == digit))
        held_out = round(_HELD_OUT * len(members))
        chosen.append(members[:held_out] if split == "held_out" else members[held_out:])
    rows = np.sort(np.concatenate(chosen))
    images = np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)
    digits = data.target[rows].astype(np.int64)
    images.flags.writeable = digits.flags.writeable = False
    return images, digits


def render(
    images: np.ndarray, directions: Sequence[Direction], starts: np.ndarray, frames: int
) -> np.ndarray:
    """N videos, uint8 `[N, F, 1, 16, 16]` in 0..255: each scan moves `SPEED` pixels a frame and wraps around.

    `images` are scans `[N, 8, 8]`, `starts` row and column `[N, 2]` of their upper left corner in frame 0.
    """
    canvas = np.zeros((len(images), CANVAS, CANVAS), dtype=np.uint8)
    canvas[:, :SCAN, :SCAN] = images
    shifts = np.array([expected_shift(direction) for direction in directions]).reshape(-1, 1, 2)
    corners = np.asarray(starts)[:, None] + shifts * np.arange(frames)[:, None]
    # Source row and column of every pixel: content sits at `corner`, so pixel y shows source row y − corner.
    source = (np.arange(CANVAS) - corners[..., None]) % CANVAS
    rows, columns = source[:, :, 0, :, None], source[:, :, 1, None, :]
    return canvas[np.arange(len(images))[:, None, None, None], rows, columns][:, :, None]


def sample_videos(
    *, videos: int, frames: int, seed: int, split: Split
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Direction]]]:
    """Blocks of random videos: uint8 `[n, F, 1, 16, 16]`, digits `[n]` and directions; `videos` in all.

    Every run of 40 consecutive videos has one of each prompt, in random order; scan and start are uniform.
    """
    images, labels = scans(split)
    generator = np.random.default_rng(seed)
    by_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    rounds = -(-videos // len(PROMPTS))
    prompts = generator.permuted(np.tile(np.arange(len(PROMPTS)), (rounds, 1)), axis=1).reshape(-1)[:videos]
    digits, turns = np.divmod(prompts, len(DIRECTIONS))
    choice = generator.random(videos)
    starts = generator.integers(CANVAS, size=(videos, 2))
    for first in range(0, videos, _ROWS_PER_GROUP):
        block = slice(first, first + _ROWS_PER_GROUP)
        picked = [
            by_digit[d][int(c * len(by_digit[d]))] for d, c in zip(digits[block], choice[block], strict=True)
        ]
        directions = [DIRECTIONS[turn] for turn in turns[block]]
        yield render(images[picked], directions, starts[block], frames), digits[block], directions


def write_dataset(path: str | Path, *, videos: int, frames: int, seed: int, split: Split) -> None:
    """Write `videos` moving digits of `frames` frames each as Parquet shards under the directory `path`.

    Columns: `prompt`, the tensor `video` (uint8 `[F, 1, 16, 16]`), `digit`, `direction`. The bytes depend on
    the arguments alone. The directory appears whole or not at all; one that already holds this very data set
    is left as it is, and any other existing `path` is a `ValueError`.
    """
    for name, value, least in (("videos", videos, 1), ("frames", frames, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    schema = dataset_schema(
        [
            pa.field("prompt", pa.string(), nullable=False),
            *tensor_fields("video"),
            pa.field("digit", pa.int32(), nullable=False),
            pa.field("direction", pa.string(), nullable=False),
        ],
        kind="video",
        provenance={
            "source": "handwritten digits of scikit-learn (load_digits), moving",
            "speed": SPEED,
            **{"videos": videos, "frames": frames, "seed": seed, "split": split},
        },
    )
    if is_there(path):
        with suppress(ValueError):  # what cannot be read is another one, too
            if ParquetDataset(path, []).schema.metadata == schema.metadata:
                return
        raise ValueError(f"{path} exists and is another data set; delete it or choose another path")

    staging = storage.begin(path)
    with storage.writing(staging) as aside:
        shard_count = -(-videos // (_ROWS_PER_GROUP * _GROUPS_PER_SHARD))
        blocks = sample_videos(videos=videos, frames=frames, seed=seed, split=split)
        for shard in range(shard_count):
            file = aside / f"{shard:05d}-of-{shard_count:05d}.parquet"
            # A dictionary of whole videos would only cost memory; checksums tell a reader damage from data.
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                use_dictionary=["prompt", "direction", "video_dtype"],
                write_page_checksum=True,
            ) as writer:
                for block in islice(blocks, _GROUPS_PER_SHARD):
                    writer.write_table(_table(*block, schema), row_group_size=_ROWS_PER_GROUP)
    storage.publish(staging, path, {})


def _table(
    pixels: np.ndarray, digits: np.ndarray, directions: list[Direction], schema: pa.Schema
) -> pa.Table:
    rows = [
        {
            "prompt": make_prompt(int(digit), direction),
            **encode_tensor("video", torch.from_numpy(video)),
            "digit": int(digit),
            "direction": direction,
        }
        for video, digit, direction in zip(pixels, digits, directions, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=schema)
