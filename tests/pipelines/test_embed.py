"""Prompts are embedded once, in blocks that outlive a kill, and training reads them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from model.umt5 import Umt5Encoder
from pipelines import cli, embed
from pipelines.blocks import Blocks
from pipelines.embed import read_prompts
from tests.fixtures import PROMPTS
from tests.wan import SIZES, write_umt5
from workers.data_check import check
from workers.dataset import ParquetDataset, dataset_description
from workers.model_directory import TextConfig


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_umt5(tmp_path_factory.mktemp("umt5"))


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert cli.main(["embed", *map(str, arguments)]) == 2
    return " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.by_hand
def test_a_run_that_was_killed_makes_only_the_rest(
    encoder: Path, ray_cluster: object, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(embed, "BLOCK", 2)
    file, output = tmp_path / "prompts.txt", tmp_path / "data" / "prompts"
    file.write_text("\n".join([*PROMPTS[:5], "", PROMPTS[0]]))
    arguments = [
        "embed", str(file), f"--encoder={encoder}", f"--output={output}", "--text_len=32",
        "--negative=blurred", "--cpus=0.5",
    ]  # fmt: skip
    make = Blocks.make
    monkeypatch.setattr(
        Blocks, "make", lambda self, named, *rest, **how: make(self, dict([*named.items()][:2]), *rest, **how)
    )
    with pytest.raises(ValueError, match="does not exist"):  # as if it had been killed after two blocks
        embed.command(None, cli.parse("embed", arguments[1:])[1])
    assert not output.exists()
    assert len(list(output.parent.glob(".prompts.blocks/*.parquet"))) == 2

    asked: list[int] = []
    monkeypatch.setattr(
        Blocks,
        "make",
        lambda self, named, *rest, **how: (
            asked.append(len(named.keys() - self._there.keys())),
            make(self, named, *rest, **how),
        ),
    )
    assert cli.main(arguments) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert asked == [2] and "5 distinct prompts, 2 of 4 blocks are there" in said
    assert not list(output.parent.glob(".prompts.blocks"))

    data = ParquetDataset(output, ["prompt", "embedding"])
    rows = [data.row(i) for i in range(len(data))]
    assert [row["prompt"] for row in rows] == PROMPTS[:5]
    alone = Umt5Encoder(str(encoder), 32)
    for row in rows:
        expected = alone.embed([row["prompt"]])[0].bfloat16()
        assert row["embedding"].dtype == torch.bfloat16 and len(row["embedding"]) < 32
        assert torch.allclose(row["embedding"].float(), expected.float(), atol=0.02)
    negative = load_file(output / "negative.safetensors")["embedding"]
    assert torch.allclose(negative.float(), alone.embed(["blurred"])[0], atol=0.02)
    assert dataset_description(data.schema)["provenance"]["encoder"] == embed.digest(str(encoder))
    text = TextConfig("umt5", str(encoder))
    assert check("data.train", str(output), text, SIZES) == []

    assert cli.main(arguments) == 0 and asked == [2]
    assert "is there already" in capfd.readouterr().out


def test_prompts_are_read_from_any_table(tmp_path: Path) -> None:
    rows = [{"text": prompt, "id": number} for number, prompt in enumerate(["a six", "a two,\nup", "a six"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text('id,text\n0,a six\n1,"a two,\nup"\n2,a six\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.csv", "a.parquet"):
        assert read_prompts(tmp_path / file, "text") == ["a six", "a two,\nup"]
        with pytest.raises(ValueError, match=rf"{file} has no column caption in every row"):
            read_prompts(tmp_path / file, "caption")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n\n", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": null}', "has no prompt in row 1; every row needs one"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.csv", b"prompt\n  \n", "has no prompt in row 0"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.doc", b"a", "there is no file of prompts at"),
        ("a.txt", b"six " * 40, "tokens, more than the 16 that this model reads"),
    ],
)
def test_prompts_that_cannot_be_read_are_said(
    name: str, content: bytes, said: str, encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    where = (tmp_path / name, f"--encoder={encoder}", f"--output={tmp_path}/out", "--text_len=16")
    assert said in refused(capfd, *where)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_none_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a six")
    said = refused(capfd, tmp_path / "a.txt", f"--encoder={tmp_path}", f"--output={tmp_path}/out")
    assert "there is no UMT5 encoder with its tokenizer at" in said
