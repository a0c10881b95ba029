"""Reading a large data set: ours beside torch's `DataLoader` over the same Parquet, from disk and from S3.

    python -m tests.benchmarks.data --page docs/results/data.md

Each reader runs in a process of its own, three times in turn with the others: a machine's speed changes from
minute to minute, and memory is that of a process. S3 is moto's server in another process.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.s3_server import S3Server
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, tensor_fields

SHAPE = (3, 4, 8, 8)
"""A latent of 1.5 KB: what is measured is the work for each row."""
GROUP, SHARD = 1000, 10_000
BATCH = 64
WINDOW = 64 * 2**20
"""Bytes within which both shuffle."""
REPEATS = 3
MB = 2**20


def write(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True)
    schema = dataset_schema(
        [pa.field("prompt", pa.string()), *tensor_fields("latent")], kind="videos", provenance={}
    )
    generator = np.random.default_rng(0)
    _, *beside = encode_tensor("latent", torch.zeros(SHAPE, dtype=torch.bfloat16)).values()
    size = 2 * int(np.prod(SHAPE))
    for shard, first in enumerate(range(0, rows, SHARD)):
        with pq.ParquetWriter(folder / f"{shard:05d}.parquet", schema, write_page_checksum=True) as writer:
            for start in range(first, min(first + SHARD, rows), GROUP):
                noise = generator.standard_normal((GROUP, size // 2), np.float32)
                raw = torch.from_numpy(noise).bfloat16().view(torch.uint8).numpy()
                columns = [
                    [f"prompt number {start + row}" for row in range(GROUP)],
                    [each.tobytes() for each in raw],
                    *([value] * GROUP for value in beside),
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP)


class Ours:
    """The reader that training uses."""

    def __init__(self, place: str):
        self.data = ParquetDataset(place, ["prompt", "latent"], shuffle_bytes=WINDOW)

    def batches(self) -> Iterator[Tensor]:
        position = 0
        while True:
            rows = self.data.batch(position, BATCH, seed=0)
            self.data.ahead(position + BATCH, BATCH, seed=0)
            yield torch.stack([row["latent"] for row in rows])
            position += BATCH


class Rows(IterableDataset):
    """Row groups in random order, and rows through a buffer of the same size, as one writes it for torch."""

    def __init__(self, place: str):
        self.place = place

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        system, path = opened(self.place)
        files = [each.path for each in system.get_file_info(fs.FileSelector(path)) if each.is_file]
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        groups = [
            (file, index)
            for file in sorted(files)
            for index in range(pq.read_metadata(file, filesystem=system).num_row_groups)
        ]
        generator = np.random.default_rng(0)
        generator.shuffle(groups)
        buffer: list[tuple[str, Tensor]] = []
        held = WINDOW // (2 * int(np.prod(SHAPE)))
        for file, index in groups[number::workers]:
            table = pq.ParquetFile(system.open_input_file(file), pre_buffer=True).read_row_group(index)
            for prompt, raw in zip(table["prompt"].to_pylist(), table["latent"].to_pylist(), strict=True):
                row = (prompt, torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(SHAPE))
                if len(buffer) < held:
                    buffer.append(row)
                    continue
                place = int(generator.integers(held))
                buffer[place], row = row, buffer[place]
                yield row
        yield from buffer


def opened(place: str) -> tuple[Any, str]:
    if not place.startswith("s3://"):
        return fs.LocalFileSystem(), place
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return fs.S3FileSystem(endpoint_override=host, scheme="http"), place.removeprefix("s3://")


class Torch:
    """torch's `DataLoader`."""

    workers = 0

    def __init__(self, place: str):
        self.loader = DataLoader(Rows(place), BATCH, num_workers=self.workers)

    def batches(self) -> Iterator[Tensor]:
        for _, latents in self.loader:
            yield latents


class TorchOfTwo(Torch):
    """The same, with two processes."""

    workers = 2


READERS = {
    "ours": Ours,
    "DataLoader, 0 workers": Torch,
    "DataLoader, 2 workers": TorchOfTwo,
}


def measure(name: str, place: str, rows: int) -> dict[str, float]:
    """Seconds to the first batch, rows a second after it, and memory of the process and its own."""
    process = psutil.Process()
    own = process.memory_info().rss
    began = time.perf_counter()
    batches = READERS[name](place).batches()
    next(batches)
    first = time.perf_counter() - began
    began, peak = time.perf_counter(), 0
    for number in range(rows // BATCH):
        next(batches)
        if number % 50 == 0:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in family))
    rate = rows // BATCH * BATCH / (time.perf_counter() - began)
    return {"first_s": first, "rows_per_s": rate, "memory_mb": (peak - own) / MB}


def serve(folder: str, ready: Any) -> None:
    server = S3Server()
    os.environ.update(server.environment)
    server.create("data")
    from infra.storage import s3

    for file in sorted(Path(folder).iterdir()):
        s3.upload(file, s3.Place("data", f"rows/{file.name}"))
    ready.put(server.environment)
    time.sleep(1e9)


def run(rows: int, read: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": rows, "read": read, "readers": []}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rows"
        write(folder, rows)
        found["gb"] = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        context = multiprocessing.get_context("spawn")
        ready = context.Queue()
        server = context.Process(target=serve, args=(str(folder), ready), daemon=True)
        server.start()
        environment = {**os.environ, **ready.get()}
        samples: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(REPEATS):
            for kind, place in (("disk", str(folder)), ("S3", "s3://data/rows")):
                for name in READERS:
                    words = [sys.executable, "-m", __spec__.name, "--reader", name, "--place", place]
                    words += ["--read", str(read if kind == "disk" else read // 4)]
                    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
                    samples.setdefault((kind, name), []).append(json.loads(done.stdout.splitlines()[-1]))
        server.terminate()
    for (kind, name), each in samples.items():
        middle = {key: median(one[key] for one in each) for key in each[0]}
        spread = [min(one["rows_per_s"] for one in each), max(one["rows_per_s"] for one in each)]
        found["readers"].append({"from": kind, "reader": name, **middle, "rows_per_s_range": spread})
    return found


def page(found: dict[str, Any]) -> str:
    rows = [
        f"| {each['from']} | {each['reader']} | {each['first_s']:.2f} s | {each['rows_per_s']:,.0f} "
        f"({each['rows_per_s_range'][0]:,.0f}–{each['rows_per_s_range'][1]:,.0f}) "
        f"| {each['memory_mb']:,.0f} MB |"
        for each in found["readers"]
    ]
    lines = [
        "# Reading a million rows",
        f"`python -m tests.benchmarks.data --rows {found['rows']} --read {found['read']}`, {os.cpu_count()} "
        f"cores ({platform.machine()}), torch {torch.__version__}: {found['rows']:,} rows of a prompt and a "
        f"latent of 1.5 KB, {found['gb']:.1f} GB in shards of {SHARD:,} rows and row groups of {GROUP:,}. "
        f"Batches of {BATCH}, shuffled within {WINDOW // MB} MiB; {found['read']:,} rows are read after the "
        "first batch, from S3 a quarter of them.",
        f"Each reader runs in a process of its own, {REPEATS} times in turn; medians; of rows a second the "
        "least and most. Memory is the most that the process and its own took beyond what they had before "
        "the data set was opened. S3 is moto's server, in Python on the same cores, which is most of what is "
        "slow there.",
        "\n".join(
            ["| from | reader | first batch | rows a second | memory |", "|---|---|---|---|---|", *rows]
        ),
        "Ours hashes pages, refuses numbers that are not finite, and gives ranks any position of the order "
        "at once, so that a run that is resumed or spread out sees the same samples. The loader does none of "
        "that: its order depends on its workers, and begins anew. It fills a buffer before its first batch.",
    ]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", type=int, default=100_000)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.reader:
        print(json.dumps(measure(asked.reader, asked.place, asked.read)))
        return
    text = page(run(asked.rows, asked.read))
    print(text)
    if asked.page:
        asked.page.write_text(text)


if __name__ == "__main__":
    main()
