"""The Parquet reader on real files: decoding, order, resume, memory and every kind of damage."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from workers.dataset import (
    ParquetDataset,
    dataset_description,
    dataset_schema,
    digest,
    encode_tensor,
    tensor_fields,
)


def write_shards(path: Path, rows: list[dict], *, shards: int, group: int) -> None:
    fields = [pa.field("prompt", pa.string()), *tensor_fields("latent"), *tensor_fields("video")]
    schema = dataset_schema(fields, kind="test", provenance={"made by": "a test"})
    path.mkdir()
    size = -(-len(rows) // shards)
    for shard in range(shards):
        table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size], schema=schema)
        pq.write_table(table, path / f"{shard}.parquet", row_group_size=group, write_page_checksum=True)


def make_rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "prompt": f"prompt {index}",
            **encode_tensor("latent", torch.randn(3, 4, 8, 8, generator=generator).bfloat16()),
            **encode_tensor("video", torch.full((2, 1, 4, 4), index % 256, dtype=torch.uint8)),
        }
        for index in range(count)
    ]


@pytest.fixture
def dataset_path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    write_shards(path, make_rows(50), shards=3, group=5)
    return path


def prompts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_rows_come_back_as_written(dataset_path: Path) -> None:
    data = ParquetDataset(dataset_path, ["prompt", "latent", "video"])
    assert len(data) == 50
    generator = torch.Generator().manual_seed(0)
    for index in range(50):
        row = data.row(index)
        latent = torch.randn(3, 4, 8, 8, generator=generator).bfloat16()
        assert row["prompt"] == f"prompt {index}"
        assert row["latent"].dtype == torch.bfloat16 and torch.equal(row["latent"], latent)
        torch.testing.assert_close(row["video"], torch.full((2, 1, 4, 4), index / 127.5 - 1))
    assert dataset_description(pq.read_schema(dataset_path / "0.parquet"))["provenance"] == {
        "made by": "a test"
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32])
def test_every_dtype_and_shape_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = [
        torch.arange(6).reshape(2, 3).to(dtype).T,
        torch.ones((), dtype=dtype),
        torch.zeros(0, 4, dtype=dtype),
    ]
    schema = dataset_schema(tensor_fields("x"), kind="test", provenance={})
    pq.write_table(
        pa.Table.from_pylist([encode_tensor("x", t) for t in tensors], schema=schema), tmp_path / "x.parquet"
    )
    data = ParquetDataset(tmp_path / "x.parquet", ["x"])
    for index, tensor in enumerate(tensors):
        expected = tensor / 127.5 - 1 if dtype == torch.uint8 else tensor
        torch.testing.assert_close(data.row(index)["x"], expected)


@pytest.mark.parametrize("shuffle_bytes", [1, 4000, 2**30])
def test_the_order_is_a_pure_function_of_seed_and_position(dataset_path: Path, shuffle_bytes: int) -> None:
    def fresh() -> ParquetDataset:
        return ParquetDataset(dataset_path, ["prompt"], shuffle_bytes=shuffle_bytes)

    whole = prompts(fresh().batch(0, 150, seed=3))
    epochs = [whole[:50], whole[50:100], whole[100:]]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

    resumed = fresh()
    assert prompts(resumed.batch(43, 20, seed=3)) == whole[43:63]
    assert prompts(resumed.batch(7, 5, seed=3)) == whole[7:12]
    ranks = [fresh() for _ in range(4)]
    shared = [prompts(ranks[rank].batch(40 + 5 * rank, 5, seed=3)) for rank in range(4)]
    assert [prompt for part in shared for prompt in part] == whole[40:60]
    assert prompts(fresh().batch(0, 50, seed=4)) != epochs[0]


def test_a_small_data_set_is_shuffled_as_a_whole_and_a_large_one_stays_out_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_shards(path, make_rows(400), shards=4, group=10)
    group_bytes = pq.read_metadata(path / "0.parquet").row_group(0).total_byte_size

    whole = ParquetDataset(path, ["prompt", "latent"])
    first_places = [int(prompt.split()[1]) for prompt in prompts(whole.batch(0, 40, seed=0))]
    assert max(first_places) - min(first_places) > 200  # one window covers all shards

    small = ParquetDataset(path, ["prompt", "latent"], shuffle_bytes=4 * group_bytes)
    reads, peak = 0, 0
    for position in range(0, 400, 8):
        before = set(small._cache)
        small.batch(position, 8, seed=0)
        reads += len(set(small._cache) - before)
        peak = max(peak, small._cached_bytes)
    assert peak <= 8 * group_bytes
    assert reads == 40  # every row group was decoded once in the epoch


def test_mistakes_are_one_sentence_that_names_the_file(dataset_path: Path, tmp_path: Path) -> None:
    def message(path: Path, columns: list[str]) -> str:
        with pytest.raises(ValueError) as caught:
            ParquetDataset(path, columns)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere does not exist" in message(tmp_path / "nowhere", ["prompt"])
    (tmp_path / "empty").mkdir()
    assert "no *.parquet shard" in message(tmp_path / "empty", ["prompt"])
    assert "no column 'caption'; it has prompt, latent" in message(dataset_path, ["caption"])

    pq.write_table(pa.table({"prompt": [1, 2]}), dataset_path / "9.parquet")
    assert "9.parquet differs" in message(dataset_path, ["prompt"])
    pq.write_table(pa.table({"prompt": ["a"], "latent": [b"1"]}), dataset_path / "9.parquet")
    assert "9.parquet lacks its column latent_shape" in message(dataset_path, ["latent"])
    newer = pa.table({"prompt": ["a"]}).replace_schema_metadata({"self_forcing": '{"format_version": 2}'})
    pq.write_table(newer, dataset_path / "9.parquet")
    assert "9.parquet has data format version 2" in message(dataset_path, ["prompt"])
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "holds no rows" in message(tmp_path / "none.parquet", ["prompt"])

    whole = (dataset_path / "0.parquet").read_bytes()
    (dataset_path / "9.parquet").write_bytes(whole[: len(whole) // 2])
    assert "9.parquet is damaged" in message(dataset_path, ["prompt"])


def test_a_flipped_bit_or_a_wrong_size_is_refused_when_the_row_is_read(
    dataset_path: Path, tmp_path: Path
) -> None:
    file = dataset_path / "0.parquet"
    latents = pq.read_metadata(file).row_group(0).column(1)
    damaged = bytearray(file.read_bytes())
    damaged[latents.dictionary_page_offset + latents.total_compressed_size // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"0\.parquet is damaged"):
        ParquetDataset(dataset_path, ["latent"]).row(0)

    short = {**encode_tensor("x", torch.ones(3)), "x_shape": [4]}
    pq.write_table(pa.Table.from_pylist([short]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 0 of .*x\.parquet .* 12 bytes instead of 16"):
        ParquetDataset(tmp_path, ["x"]).row(0)
    with pytest.raises(ValueError, match="dtype float64"):
        encode_tensor("x", torch.ones(3, dtype=torch.float64))


def test_hidden_files_are_no_shards(dataset_path: Path) -> None:
    for name in ("._0.parquet", ".0.parquet"):
        (dataset_path / name).write_bytes(b"what macOS leaves beside a file")
    data = ParquetDataset(dataset_path, ["prompt"], skip_damaged=True)
    assert len(data) == 50 and data.skipped == 0
    assert len(ParquetDataset(dataset_path, ["prompt"])) == 50


def test_a_digest_tells_data_sets_apart_and_not_where_they_lie(dataset_path: Path, tmp_path: Path) -> None:
    known = digest(dataset_path)
    (dataset_path / "._0.parquet").write_bytes(b"hidden")
    dataset_path.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == known
    rows = make_rows(50)
    write_shards(tmp_path / "again", rows, shards=3, group=5)
    assert digest(tmp_path / "again") == known
    rows[20] |= encode_tensor("video", torch.full((2, 1, 4, 4), 77, dtype=torch.uint8))
    write_shards(tmp_path / "other", rows, shards=3, group=5)
    assert digest(tmp_path / "other") != known
    (tmp_path / "moved" / "2.parquet").unlink()
    assert digest(tmp_path / "moved") != known
