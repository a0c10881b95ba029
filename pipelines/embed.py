"""`self-forcing embed`: prompts, embedded by UMT5 once, as a data set that training reads.

Prompts are embedded in blocks, each a file named by what is in it and by the encoder. A run that was killed
finds its blocks again and makes the rest; the data set is published when all are there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from infra import storage
from infra.settings import absolute
from model.umt5 import Tokenizer, Umt5Encoder, digest
from orchestrator.cluster import connect
from pipelines import tables
from pipelines.blocks import Blocks
from pipelines.console import say
from pipelines.tables import read_rows
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, tensor_fields

BLOCK = 256
"""Prompts in a block: at 60 tokens each of UMT5-XXL in bfloat16, a file of 126 MB."""
TOGETHER = 16
"""Prompts that go through the encoder at once."""
NEGATIVE = "negative.safetensors"
SUFFIXES = (".txt", *tables.SUFFIXES)


def command(_: None, options: Any) -> None:
    """Write a data set and beside it the negative prompt's file; ValueError, before anything starts, where
    prompts or encoder cannot be read."""
    for name in ("actors", "text_len"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    with storage.fetched(options.prompts) as file:
        prompts = read_prompts(file, options.column)
    encoder = digest(options.encoder)
    identity = {"encoder": encoder, "prompts": _hash(prompts), "negative": options.negative}
    output = absolute(options.output)
    if storage.is_complete(output) and storage.read_metadata(output).get("identity") == identity:
        say(f"embed: {output} is there already.")
        return
    _check_lengths([*prompts, options.negative], options)
    blocks = Blocks(output)
    # The negative prompt is a block of its own, so that only actors load the encoder.
    cut = [prompts[first : first + BLOCK] for first in range(0, len(prompts), BLOCK)]
    named = {f"{_hash([encoder, *block])[:32]}.parquet": block for block in [*cut, [options.negative]]}
    say(f"embed: {len(prompts)} distinct prompts{blocks.told(named)}")
    with connect(options.address):
        arguments = (str(Path(options.encoder).absolute()), options.text_len, encoder)
        blocks.make(named, _Embedder, arguments, options, label="embed")
    staging = storage.begin(output)
    with storage.writing(staging) as directory:
        *names, last = named
        negative = ParquetDataset(blocks.at(last), ["embedding"]).row(0)["embedding"]
        save_file({"embedding": negative}, directory / NEGATIVE, {"encoder": encoder})
    blocks.gather(names, staging)
    storage.publish(staging, output, {"identity": identity})
    blocks.discard()
    say(f"embed: wrote {output}; the negative prompt is {output}/{NEGATIVE}.")


def read_prompts(path: Path, column: str) -> list[str]:
    """The distinct prompts of a file, in their order.

    Args:
        path: a text file with a prompt a line, or JSON lines, CSV or Parquet with a `column` of prompts.

    Raises:
        ValueError: the file cannot be read, lacks the column, or has an empty or no prompt; names the row.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ValueError(
            f"there is no file of prompts at {path}; name one that ends in {', '.join(SUFFIXES)}."
        )
    try:
        if path.suffix == ".txt":
            found: Sequence[Any] = [line for line in path.read_text().splitlines() if line.strip()]
        else:
            found = [row[column] for row in read_rows(path, [column])]
    except KeyError:
        raise ValueError(f"{path} has no column {column} in every row; name another --column.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    for row, prompt in enumerate(found):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path} has no prompt in row {row}; every row needs one.")
    if not found:
        raise ValueError(f"{path} holds no prompts.")
    return list(dict.fromkeys(map(str, found)))


def _check_lengths(prompts: Sequence[str], options: Any) -> None:
    """ValueError for a prompt of more tokens than the model reads; the tokenizer alone is loaded."""
    tokenizer = Tokenizer(options.encoder, options.text_len)
    for prompt in prompts:
        tokenizer.tokens(prompt)


class _Embedder:
    """A Ray Data actor that writes blocks."""

    def __init__(self, encoder: str, text_len: int, identity: str):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = Umt5Encoder(encoder, text_len, self.device)
        fields = [pa.field("prompt", pa.string()), *tensor_fields("embedding")]
        self.schema = dataset_schema(fields, kind="prompts", provenance={"encoder": identity})

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompts, rows = list(row["block"]), []
        for first in range(0, len(prompts), TOGETHER):
            together = prompts[first : first + TOGETHER]
            for prompt, embedding in zip(together, self.encoder.embed(together), strict=True):
                rows.append({"prompt": prompt, **encode_tensor("embedding", embedding.bfloat16())})
        table = pa.Table.from_pylist(rows, schema=self.schema)
        with storage.write_file(row["path"]) as file:
            pq.write_table(table, file)
        return {"prompts": len(prompts)}


def _hash(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()
