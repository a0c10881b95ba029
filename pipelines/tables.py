"""Tables that people write: rows of a .jsonl, .csv or .parquet file."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".csv", ".parquet")


def read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table, each with these columns at least.

    Raises:
        KeyError: some row lacks a column, which is its argument.
        ValueError: the file cannot be read as its suffix says, which it says why.
    """
    try:
        match file.suffix:
            case ".jsonl":
                rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
            case ".csv":
                with open(file, newline="", encoding="utf-8") as opened:
                    rows = list(csv.DictReader(opened))
            case ".parquet":
                table = pq.read_table(file)
                rows = table.select([name for name in columns if name in table.column_names]).to_pylist()
            case _:
                raise ValueError(f"use {', '.join(SUFFIXES)}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error).splitlines()[0].rstrip(".")) from None
    for row in rows:
        for name in columns:
            if not isinstance(row, dict) or name not in row:
                raise KeyError(name)
    return rows
