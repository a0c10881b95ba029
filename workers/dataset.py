"""The one reader of Parquet data sets, and the convention their writers share.

A data set is a directory of `*.parquet` shards (or one such file). Text and numbers are ordinary columns. A
tensor named `video` is three columns: `video` (little-endian bytes), `video_shape` (list<int32>) and
`video_dtype` (a torch dtype's name); `encode_tensor` and `tensor_fields` make them. Tensors stored as uint8
are pixels and are read as float32 in [-1, 1]; every other tensor is read as stored.

The reader knows nothing about ranks, devices or models. Its order is a pure function of `(seed, position)`,
so a position is all the state that a checkpoint keeps, and any number of ranks may share one order.
"""

import bisect
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra import storage
from infra.storage import Stored

FORMAT_VERSION = 1
SHUFFLE_BYTES = 2**30
"""Bytes of the window within which samples are shuffled and kept in memory; a data set that fits in it is
shuffled as a whole. Another size is another order."""
_METADATA_KEY = b"self_forcing"
_DIGEST_BLOCK, _DIGEST_BLOCKS = 2**14, 32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
}

_TOGETHER = 64
"""Shards of which a scan holds what it was asked for."""
_READERS_AHEAD = 4
"""Row groups that are read at once."""
_FOOTERS = 64
"""Shards whose footers are kept, as one of few row groups is some kilobytes and one of many megabytes."""

Row = dict[str, Any]
T = TypeVar("T")


def tensor_fields(name: str) -> list[pa.Field]:
    """The three schema fields of the tensor `name`, in the order in which `encode_tensor` names them."""
    return [
        pa.field(name, pa.binary(), nullable=False),
        pa.field(f"{name}_shape", pa.list_(pa.int32()), nullable=False),
        pa.field(f"{name}_dtype", pa.string(), nullable=False),
    ]


def encode_tensor(name: str, tensor: Tensor) -> Row:
    """`tensor` (any shape, any device) as the three columns of one row; ValueError for another dtype."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype}; a data set stores {', '.join(_DTYPES)}")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {name: raw, f"{name}_shape": list(tensor.shape), f"{name}_dtype": dtype}


def dataset_schema(fields: Sequence[pa.Field], *, kind: str, provenance: Mapping[str, Any]) -> pa.Schema:
    """A schema for shards, carrying format version, kind of data, and (JSON-able) where it came from."""
    description = {"format_version": FORMAT_VERSION, "kind": kind, "provenance": dict(provenance)}
    return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(description, sort_keys=True).encode()})


def dataset_description(schema: pa.Schema) -> dict[str, Any]:
    """What `dataset_schema` recorded: `format_version`, `kind`, `provenance`; empty in others' files."""
    return json.loads((schema.metadata or {}).get(_METADATA_KEY, b"{}"))


def digest(path: str | Path) -> str:
    """A SHA-256 that tells data sets apart, cheap for terabytes: it reads at most 1 MiB a shard, and footers.

    Covered are every shard's name, size and footer (schema, provenance, rows, sizes, offsets and statistics
    of every column chunk), small shards as a whole, and of larger ones evenly spaced blocks. Where the data
    set lies and when it was written are not. Bytes changed in place between those blocks stay unseen;
    checksums find those on reading. ValueError where there is no data set at `path`.
    """
    total = hashlib.sha256()
    for pieces in storage.each(_pieces, _find_shards(path)):
        for piece in pieces:
            total.update(piece)
    return total.hexdigest()


def _pieces(shard: Stored) -> list[bytes]:
    """What `digest` reads of a shard."""
    size = shard.size
    with shard.open() as file:

        def read(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        footer = min(size, int.from_bytes(read(max(0, size - 8), 8)[:4], "little") + 8)
        spacing = max(_DIGEST_BLOCK, size // _DIGEST_BLOCKS)
        blocks = [read(start, _DIGEST_BLOCK) for start in range(0, size, spacing)]
        return [f"{shard.name}\0{size}\0".encode(), *blocks, read(size - footer, footer)]


@dataclass(frozen=True)
class _Footer:
    """What is kept of a shard's: a data set of a million rows may have as many row groups."""

    schema: pa.Schema
    rows: np.ndarray
    sizes: np.ndarray  # bytes of each row group's columns, before they are compressed


class ParquetDataset:
    """Rows of a directory of Parquet shards, by index or in an endless shuffled order.

    Everything that can be checked without reading the data is checked at once, and a mistake is a
    `ValueError` of one sentence naming the file. Row groups are read and decoded on demand, several at a
    time; at most about twice `shuffle_bytes` stay decoded. Of what is not read there is 40 bytes a row group
    in memory. A row is a dict of the requested `columns`: `str`, `int` and `float` values, and torch tensors.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str],
        *,
        shuffle_bytes: int = SHUFFLE_BYTES,
        skip_damaged: bool = False,
    ) -> None:
        """`skip_damaged` leaves out shards that cannot be read, and counts them: it reads all once."""
        if shuffle_bytes < 1:
            raise ValueError(f"shuffle_bytes is {shuffle_bytes}; it must be a positive number of bytes")
        self.columns = tuple(columns)
        self._shards = _find_shards(path)
        self._shuffle_bytes = shuffle_bytes
        self._cache: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._cached_bytes = 0
        self._reader = ThreadPoolExecutor(_READERS_AHEAD, thread_name_prefix="row groups")
        self._metadata = lru_cache(_FOOTERS)(self._read_metadata)
        self._epoch: tuple[tuple[int, int], list[np.ndarray], list[int]] | None = None
        self._window: tuple[tuple[int, int, int], np.ndarray] | None = None

        found = len(self._shards)
        if skip_damaged:
            whole = storage.each(_is_whole, self._shards)
            self._shards = [file for file, kept in zip(self._shards, whole, strict=True) if kept]
            if not self._shards:
                raise ValueError(f"every shard of the data set {path} is damaged; write it again")
        self.skipped = found - len(self._shards)
        """Damaged shards that were left out."""
        footers = storage.each(_read_footer, self._shards)
        first, self.schema = (
            self._shards[0],
            footers[0].schema,
        )  # with every column, and what a writer recorded
        self._tensors, self._stored = _stored_columns(first, self.schema, self.columns)
        for file, footer in zip(self._shards, footers, strict=True):
            if footer.schema.equals(self.schema):
                continue
            _stored_columns(file, footer.schema, self.columns)
            for name in self._stored:
                if footer.schema.field(name).type != self.schema.field(name).type:
                    raise ValueError(f"column {name!r} of {file} differs from that of {first}")
        rows = np.concatenate([footer.rows for footer in footers])
        counts = [len(footer.rows) for footer in footers]
        filled = rows > 0
        # Of each row group that has rows: its shard, its index there, its rows, its first row, its size.
        self._shard_of = np.repeat(np.arange(len(footers)), counts)[filled]
        self._index_of = np.concatenate([np.arange(count) for count in counts])[filled]
        self._rows_of = rows[filled]
        self._first_rows = np.cumsum(self._rows_of) - self._rows_of
        self._size_of = np.concatenate([footer.sizes for footer in footers])[filled]
        self._length = int(rows.sum())
        if self._length == 0:
            raise ValueError(f"the data set {path} holds no rows")

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Row:
        """Row `index` (0 ≤ index < len) in the order in which the shards store it."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of a data set of {self._length}")
        group = self._group(index)
        table, offset = self._table(group), index - int(self._first_rows[group])
        shard = self._shards[self._shard_of[group]]
        row: Row = {}
        for name in self.columns:
            value = table[name][offset].as_py()
            if name in self._tensors:
                shape, dtype = (table[f"{name}_{part}"][offset].as_py() for part in ("shape", "dtype"))
                try:
                    value = _decode_tensor(value, shape, dtype)
                except (ValueError, TypeError) as error:
                    what = f"row {index} of {shard} has a damaged tensor {name!r}"
                    raise ValueError(f"{what}: {error}") from error
                if value.is_floating_point() and not value.isfinite().all():
                    what = f"row {index} of the data set has a tensor {name!r}"
                    raise ValueError(f"{what} with numbers that are not finite ({shard})")
            row[name] = value
        return row

    def scan(self, columns: Sequence[str], whole: str) -> Iterator[tuple[Stored, pa.Table, list[int]]]:
        """Each shard, and its columns of these names as they are stored; nothing else is read.

        Last is the first row of each row group that lacks values of the column `whole`, by its statistics.
        Shards are read several at a time, and come in their order.
        """

        def read(file: Stored) -> tuple[Stored, pa.Table, list[int]]:
            try:
                with file.open() as opened:
                    shard = pq.ParquetFile(opened)
                    return file, shard.read(columns=list(columns)), _nulls(shard.metadata, whole)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(_damaged(file, error)) from error

        for first in range(0, len(self._shards), _TOGETHER):
            yield from storage.each(read, self._shards[first : first + _TOGETHER])

    def batch(self, position: int, size: int, seed: int) -> list[Row]:
        """Samples `position … position + size − 1` of the endless order of `seed`.

        Sample `p` belongs to epoch `p // len(self)`; every epoch visits each row once, in an order drawn from
        `(seed, epoch)` alone. R ranks share a batch by each asking for its own part of the positions.
        """
        indices = [self._shuffled(sample, seed) for sample in range(position, position + size)]
        for group in dict.fromkeys(map(self._group, indices)):
            self._ask(group)
        return [self.row(index) for index in indices]

    def ahead(self, position: int, size: int, seed: int) -> None:
        """Begin to read what `batch` will be asked for, beside whatever else goes on."""
        for sample in range(position, position + size):
            self._ask(self._group(self._shuffled(sample, seed)))

    def _group(self, index: int) -> int:
        """The row group of a row."""
        return int(np.searchsorted(self._first_rows, index, side="right")) - 1

    def _shuffled(self, position: int, seed: int) -> int:
        """The row at `position`: row groups in random order, cut into windows that are shuffled row by row.

        A random row group for each sample would decode the whole group for one row once the data exceeds the
        memory; inside a window each group is decoded once.
        """
        epoch, place = divmod(position, self._length)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            windows = self._draw_windows(np.random.default_rng([seed, epoch]))
            sizes = (int(self._rows_of[window].sum()) for window in windows)
            self._epoch = ((seed, epoch), windows, [0, *accumulate(sizes)])
        _, windows, starts = self._epoch
        window = bisect.bisect_right(starts, place) - 1
        if self._window is None or self._window[0] != (seed, epoch, window):
            firsts, counts = self._first_rows[windows[window]], self._rows_of[windows[window]]
            rows = np.concatenate(
                [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
            )
            shuffled = np.random.default_rng([seed, epoch, window]).permutation(rows)
            self._window = ((seed, epoch, window), shuffled)
        return int(self._window[1][place - starts[window]])

    def _draw_windows(self, generator: np.random.Generator) -> list[np.ndarray]:
        """All row groups in random order, cut into windows of at most `shuffle_bytes`, or of one group."""
        order = generator.permutation(len(self._first_rows))
        cuts, filled = [], 0
        for place, size in enumerate(self._size_of[order].tolist()):
            filled += size
            if place and filled > self._shuffle_bytes:
                cuts.append(place)
                filled = size
        return np.split(order, cuts)

    def _ask(self, group: int) -> "Future[pa.Table]":
        """The row group's table, as it is or will be read."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        self._cache[group] = asked = self._reader.submit(self._read, group)
        self._cached_bytes += int(self._size_of[group])
        while self._cached_bytes > 2 * self._shuffle_bytes and len(self._cache) > 1:
            dropped, table = self._cache.popitem(last=False)
            table.cancel()
            self._cached_bytes -= int(self._size_of[dropped])
        return asked

    def _table(self, group: int) -> pa.Table:
        """The decoded row group, from memory if it was used lately."""
        try:
            return self._ask(group).result()
        except (OSError, pa.ArrowException) as error:
            if self._cache.pop(group, None) is not None:
                self._cached_bytes -= int(self._size_of[group])
            raise ValueError(_damaged(self._shards[self._shard_of[group]], error)) from error

    def _read(self, group: int) -> pa.Table:
        shard, index = int(self._shard_of[group]), int(self._index_of[group])
        options: dict[str, Any] = {"pre_buffer": True, "page_checksum_verification": True}
        with self._shards[shard].open() as opened:
            file = pq.ParquetFile(opened, metadata=self._metadata(shard), **options)
            return file.read_row_group(index, columns=self._stored, use_threads=False).combine_chunks()

    def _read_metadata(self, shard: int) -> pq.FileMetaData:
        with self._shards[shard].open() as opened:
            return pq.read_metadata(opened)


def is_there(path: str | Path) -> bool:
    """Whether anything lies where a data set is named."""
    return storage.stored(path, ".parquet") is not None


def _find_shards(path: str | Path) -> list[Stored]:
    # Hidden files are other programs' business: macOS puts a `._` file beside each on a foreign disk.
    shards = storage.stored(path, ".parquet")
    if shards is None:
        raise ValueError(f"the data set {path} does not exist; `self-forcing prepare` writes one")
    if not shards:
        raise ValueError(f"the data set {path} holds no *.parquet shard; `self-forcing prepare` writes some")
    return shards


def _is_whole(file: Stored) -> bool:
    try:
        with file.open() as opened:
            shard = pq.ParquetFile(opened, page_checksum_verification=True)
            for _ in shard.iter_batches():
                pass
    except (OSError, pa.ArrowException):
        return False
    return True


def _nulls(metadata: pq.FileMetaData, column: str) -> list[int]:
    """The first row of each row group that lacks values of `column`, by its statistics."""
    found, first = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for each in map(group.column, range(group.num_columns)):
            counted = each.statistics is not None and each.statistics.has_null_count
            if each.path_in_schema == column and counted and each.statistics.null_count:
                found.append(first)
        first += group.num_rows
    return found


def _read_footer(file: Stored) -> _Footer:
    try:
        with file.open() as opened:
            metadata = pq.read_metadata(opened)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(file, error)) from error
    version = dataset_description(schema).get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        what = f"{file} has data format version {version}"
        raise ValueError(f"{what}; this release reads version {FORMAT_VERSION}")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
    return _Footer(schema, np.array(rows, np.int64), np.array(sizes, np.int64))


def _stored_columns(
    file: Stored, schema: pa.Schema, columns: Sequence[str]
) -> tuple[frozenset[str], list[str]]:
    """The names among `columns` that are tensors, and every stored column that `columns` need."""
    tensors, stored = set(), []
    for name in columns:
        if name not in schema.names:
            raise ValueError(f"{file} has no column {name!r}; it has {', '.join(schema.names)}")
        stored.append(name)
        if pa.types.is_binary(schema.field(name).type) or pa.types.is_large_binary(schema.field(name).type):
            beside = [f"{name}_shape", f"{name}_dtype"]
            if not set(beside) <= set(schema.names):
                raise ValueError(f"the tensor {name!r} of {file} lacks its column {' or '.join(beside)}")
            tensors.add(name)
            stored += beside
    return frozenset(tensors), stored


def _decode_tensor(raw: bytes, shape: list[int], dtype_name: str) -> Tensor:
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise ValueError(f"unknown dtype {dtype_name!r}")
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes instead of {expected} for shape {shape}")
    # The copy into a bytearray gives torch memory that it may write to; an empty buffer it refuses.
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.float().div_(127.5).sub_(1.0) if dtype == torch.uint8 else tensor


def _damaged(file: Stored, error: Exception) -> str:
    reason = str(error).splitlines()[0].rstrip(".")
    return f"the shard {file} is damaged or not a Parquet file ({reason}); write the data set again"
