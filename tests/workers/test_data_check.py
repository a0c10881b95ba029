"""What a data set holds that a stage cannot use is one sentence before anything starts, and names the row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from model.transformer import TransformerConfig
from workers.data_check import check, check_negative
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, tensor_fields
from workers.model_directory import TextConfig, VideoConfig

SIZES = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1, text_len=4, text_dim=16, freq_dim=32)
PIXELS = VideoConfig(frames=3, channels=4, height=4, width=4)
LATENTS = VideoConfig(frames=3, channels=4, height=4, width=4, codec="none")
TEXT, EMBEDDED = TextConfig(), TextConfig("embedded")


def pixels(*shape: int) -> dict[str, Any]:
    return encode_tensor("video", torch.zeros(shape, dtype=torch.uint8))


def embedding(*shape: int) -> dict[str, Any]:
    return encode_tensor("embedding", torch.zeros(shape))


def write(path: Path, rows: list[dict[str, Any]], good: dict[str, Any], count: int = 1) -> str:
    """A shard of good rows and one that has `rows` at its end; returns the place."""
    path.mkdir()
    pq.write_table(pa.Table.from_pylist([good] * count), path / "0.parquet")
    pq.write_table(pa.Table.from_pylist([good] * 2 + rows), path / "1.parquet")
    return str(path)


GOOD = {"prompt": "a two drifting up", **pixels(3, 1, 8, 8)}
EXPECTED = r"and 3 × 1 × 8 × 8 is expected \(`video`: \[frames, channels, height, width\]\)\.$"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (pixels(6, 1, 8, 8), r"holds videos of \[6, 1, 8, 8\] \(row 2 of 1.parquet\), " + EXPECTED),
        (pixels(3, 8, 8, 1), r"holds videos of \[3, 8, 8, 1\] \(row 2 of 1.parquet\), " + EXPECTED),
        (pixels(3, 3, 8, 8), r"holds videos of \[3, 3, 8, 8\] \(row 2 of 1.parquet\), " + EXPECTED),
        (pixels(3, 8, 8), r"holds videos of \[3, 8, 8\] \(row 2 of 1.parquet\), " + EXPECTED),
        (pixels(0, 1, 8, 8), r"holds videos of \[0, 1, 8, 8\] \(row 2 of 1.parquet\), " + EXPECTED),
        ({"video_dtype": "float64"}, r"stores video as float64 \(row 2 of 1.parquet\); use uint8 or float16"),
        ({"video": None}, r"has no video in row 0 of 1.parquet; every row needs one\.$"),
        ({"video_shape": None}, r"has no video in row 2 of 1.parquet; every row needs one\.$"),
        ({"prompt": None}, r"has no prompt in row 2 of 1.parquet; every row needs one\.$"),
        (
            {"prompt": "one two three four five"},
            r"has a prompt of 5 words \(row 2 of 1.parquet\), more than the 4 that the model reads; "
            r"shorten it\.$",
        ),
        ({"prompt": "x" * 65}, r"has a prompt of 5 words \(row 2 of 1.parquet\)"),
    ],
)
def test_videos_and_prompts(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "data", [GOOD | row], GOOD)
    with pytest.raises(ValueError, match=f"^data.train at {path} {says}") as error:
        check("data.train", path, TEXT, SIZES, video=PIXELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (embedding(5, 16), r"holds embeddings of \[5, 16\] \(row 2 of 1.parquet\), and 1 to 4 × 16 is"),
        (embedding(0, 16), r"holds embeddings of \[0, 16\] \(row 2 of 1.parquet\), and 1 to 4 × 16 is"),
        (embedding(4, 8), r"holds embeddings of \[4, 8\] \(row 2 of 1.parquet\), and 1 to 4 × 16 is"),
        ({"embedding_dtype": "uint8"}, r"stores embedding as uint8 \(row 2 of 1.parquet\); use float16"),
        ({"embedding": None}, r"has no embedding in row 0 of 1.parquet"),
    ],
)
def test_embeddings(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    good = embedding(4, 16)
    path = write(tmp_path / "data", [good | row], good)
    with pytest.raises(ValueError, match=f"^data.train at {path} {says}"):
        check("data.train", path, EMBEDDED, SIZES)


def test_what_fits_passes(tmp_path: Path) -> None:
    path = write(tmp_path / "pixels", [GOOD | {"prompt": ""}, GOOD | {"prompt": "x" * 64}], GOOD)
    assert check("data.train", path, TEXT, SIZES, video=PIXELS) == []
    (tmp_path / "pixels" / "2.parquet").write_bytes(b"damaged")
    said = check("data.train", path, TEXT, SIZES, video=PIXELS, skip_damaged=True)
    assert said == [f"left out 1 damaged shards of data.train at {path}"]
    longer = {"prompt": "any length of words that a model could not read", **pixels(5, 1, 8, 8)}
    path = write(tmp_path / "longer", [longer], GOOD)
    assert check("data.held_out", path, TEXT, None, video=PIXELS, longer=True) == []
    path = write(tmp_path / "shorter", [GOOD | pixels(2, 1, 8, 8)], GOOD)
    with pytest.raises(ValueError, match=r"\[2, 1, 8, 8\] \(row 2 of 1.parquet\), and ≥ 3 × 1 × 8 × 8 is"):
        check("data.held_out", path, TEXT, None, video=PIXELS, longer=True)
    latent = {**embedding(4, 16), **encode_tensor("latent", torch.zeros(3, 4, 4, 4, dtype=torch.bfloat16))}
    assert check("data.real", write(tmp_path / "b", [], latent), EMBEDDED, SIZES, video=LATENTS) == []


def test_numbers_that_are_not_finite_are_named_when_the_row_is_read(tmp_path: Path) -> None:
    bad = encode_tensor("embedding", torch.full((4, 16), torch.nan, dtype=torch.bfloat16))
    path = write(tmp_path / "data", [bad], embedding(4, 16))
    data = ParquetDataset(path, ["embedding"])
    data.row(2)
    with pytest.raises(
        ValueError, match=r"row 3 .* tensor 'embedding' with numbers that are not finite \(.*1\.parquet\)"
    ):
        data.row(3)


def test_the_content_of_videos_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data", [GOOD], GOOD, count=100)
    columns: list[str] = []
    read = pq.ParquetFile.read

    def noted(file: pq.ParquetFile, **settings: Any) -> pa.Table:
        columns.extend(settings["columns"])
        return read(file, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read", noted)
    check("data.train", path, TEXT, SIZES, video=PIXELS)
    assert set(columns) == {"prompt", "video_shape", "video_dtype"}


def test_a_negative_prompt_that_does_not_fit(tmp_path: Path) -> None:
    check_negative("one two three four", None, SIZES)
    with pytest.raises(
        ValueError, match=r"negative_prompt has 5 words, more than the 4 that the model reads"
    ):
        check_negative("one two three four five", None, SIZES)
    file = tmp_path / "negative.safetensors"
    where = "distill.roles.teacher.negative_embedding at "
    for content, says in (
        (None, "is no safetensors file with the tensor `embedding`: .*o such file"),
        (
            {"other": torch.zeros(4, 16)},
            "is no safetensors file with the tensor `embedding`: File does",
        ),
        ({"embedding": torch.zeros(1, 4, 16)}, r"has a tensor `embedding` of \(1, 4, 16\), and finite"),
        ({"embedding": torch.full((4, 16), torch.nan)}, r"and finite numbers of 1 to 4 × 16 are"),
    ):
        if content is not None:
            save_file(content, file)
        with pytest.raises(ValueError, match=where + f".*{says}"):
            check_negative("", str(file), SIZES)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        check_negative("", str(file), SIZES)
    save_file({"embedding": torch.zeros(4, 16)}, file)
    check_negative("", str(file), SIZES)


def test_prompts_of_another_text_encoder_are_refused(tmp_path: Path) -> None:
    fields = [pa.field("prompt", pa.string()), *tensor_fields("embedding")]
    schema = dataset_schema(fields, kind="prompts", provenance={"encoder": "one"})
    row = {"prompt": "a", **encode_tensor("embedding", torch.zeros(2, 16))}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "0.parquet")
    negative = str(tmp_path / "negative.safetensors")
    save_file({"embedding": torch.zeros(4, 16)}, negative, {"encoder": "one"})
    for known in ("one", ""):
        assert check("data.train", str(tmp_path), EMBEDDED, SIZES, encoder=known) == []
        check_negative("", negative, SIZES, known)
    says = r"was embedded by another text encoder than the model's"
    with pytest.raises(ValueError, match=f"data.train at .* {says}"):
        check("data.train", str(tmp_path), EMBEDDED, SIZES, encoder="two")
    with pytest.raises(ValueError, match=f"negative_embedding at .* {says}"):
        check_negative("", negative, SIZES, "two")
