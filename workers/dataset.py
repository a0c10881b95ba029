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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

_READERS = 16
"""Shards that are looked at at once."""

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
    for pieces in _each(_pieces, _find_shards(path)):
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
class _RowGroup:
    shard: int
    index: int
    first_row: int
    rows: int
    size: int


class ParquetDataset:
    """Rows of a directory of Parquet shards, by index or in an endless shuffled order.

    Everything that can be checked without reading the data is checked at once, and a mistake is a
    `ValueError` of one sentence naming the file. Row groups are memory-mapped and decoded on demand; at most
    about twice `shuffle_bytes` stay decoded. A row is a dict of the requested `columns`: `str`, `int` and
    `float` values, and torch tensors.
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
        self._groups: list[_RowGroup] = []
        self._length = 0
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._epoch: tuple[tuple[int, int], list[np.ndarray], list[int]] | None = None
        self._window: tuple[tuple[int, int, int], np.ndarray] | None = None

        found = len(self._shards)
        if skip_damaged:
            whole = _each(_is_whole, self._shards)
            self._shards = [file for file, kept in zip(self._shards, whole, strict=True) if kept]
            if not self._shards:
                raise ValueError(f"every shard of the data set {path} is damaged; write it again")
        self.skipped = found - len(self._shards)
        """Damaged shards that were left out."""
        footers = _each(_read_footer, self._shards)
        self._metadata = [metadata for metadata, _ in footers]
        first, self.schema = self._shards[0], footers[0][1]  # with every column, and what a writer recorded
        self._tensors, self._stored = _stored_columns(first, self.schema, self.columns)
        for shard, (file, (metadata, own)) in enumerate(zip(self._shards, footers, strict=True)):
            _stored_columns(file, own, self.columns)
            for name in self._stored:
                if own.field(name).type != self.schema.field(name).type:
                    raise ValueError(f"column {name!r} of {file} differs from that of {first}")
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                if group.num_rows:
                    place = (shard, index, self._length)
                    self._groups.append(_RowGroup(*place, group.num_rows, group.total_byte_size))
                self._length += group.num_rows
        if self._length == 0:
            raise ValueError(f"the data set {path} holds no rows")
        self._first_rows = [group.first_row for group in self._groups]

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Row:
        """Row `index` (0 ≤ index < len) in the order in which the shards store it."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of a data set of {self._length}")
        group = bisect.bisect_right(self._first_rows, index) - 1
        table, offset = self._table(group), index - self._first_rows[group]
        shard = self._shards[self._groups[group].shard]
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

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Stored, pa.Table]]:
        """Each shard and its columns of these names, as they are stored; nothing else is read."""
        for file in self._shards:
            try:
                with file.open() as opened:
                    table = pq.read_table(opened, columns=list(columns))
                yield file, table
            except (OSError, pa.ArrowException) as error:
                raise ValueError(_damaged(file, error)) from error

    def nulls(self, shard: Stored, column: str) -> list[int]:
        """The first row of each row group of `shard` that lacks values of `column`, by its statistics."""
        metadata, found = self._metadata[self._shards.index(shard)], []
        first = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            for each in map(group.column, range(group.num_columns)):
                counted = each.statistics is not None and each.statistics.has_null_count
                if each.path_in_schema == column and counted and each.statistics.null_count:
                    found.append(first)
            first += group.num_rows
        return found

    def batch(self, position: int, size: int, seed: int) -> list[Row]:
        """Samples `position … position + size − 1` of the endless order of `seed`.

        Sample `p` belongs to epoch `p // len(self)`; every epoch visits each row once, in an order drawn from
        `(seed, epoch)` alone. R ranks share a batch by each asking for its own part of the positions.
        """
        return [self.row(self._shuffled(sample, seed)) for sample in range(position, position + size)]

    def _shuffled(self, position: int, seed: int) -> int:
        """The row at `position`: row groups in random order, cut into windows that are shuffled row by row.

        A random row group for each sample would decode the whole group for one row once the data exceeds the
        memory; inside a window each group is decoded once.
        """
        epoch, place = divmod(position, self._length)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            windows = self._draw_windows(np.random.default_rng([seed, epoch]))
            sizes = (sum(self._groups[group].rows for group in window) for window in windows)
            self._epoch = ((seed, epoch), windows, [0, *accumulate(sizes)])
        _, windows, starts = self._epoch
        window = bisect.bisect_right(starts, place) - 1
        if self._window is None or self._window[0] != (seed, epoch, window):
            groups = [self._groups[group] for group in windows[window]]
            rows = np.concatenate([np.arange(g.first_row, g.first_row + g.rows) for g in groups])
            shuffled = np.random.default_rng([seed, epoch, window]).permutation(rows)
            self._window = ((seed, epoch, window), shuffled)
        return int(self._window[1][place - starts[window]])

    def _draw_windows(self, generator: np.random.Generator) -> list[np.ndarray]:
        """All row groups in random order, cut into windows of at most `shuffle_bytes`, or of one group."""
        order = generator.permutation(len(self._groups))
        cuts, filled = [], 0
        for place, group in enumerate(order):
            filled += self._groups[group].size
            if place and filled > self._shuffle_bytes:
                cuts.append(place)
                filled = self._groups[group].size
        return np.split(order, cuts)

    def _table(self, group: int) -> pa.Table:
        """The decoded row group, from memory if it was used lately."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        shard, index = self._groups[group].shard, self._groups[group].index
        options: dict[str, Any] = {"pre_buffer": True, "page_checksum_verification": True}
        try:
            with self._shards[shard].open() as opened:
                file = pq.ParquetFile(opened, metadata=self._metadata[shard], **options)
                table = file.read_row_group(index, columns=self._stored, use_threads=False).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(_damaged(self._shards[shard], error)) from error
        self._cache[group] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > 2 * self._shuffle_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table


def is_there(path: str | Path) -> bool:
    """Whether anything lies where a data set is named."""
    return storage.stored(path, ".parquet") is not None


def _each(work: Callable[[Stored], T], shards: Sequence[Stored]) -> list[T]:
    """`work` on every shard, several at a time, as most of it is waiting."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, shards))


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


def _read_footer(file: Stored) -> tuple[pq.FileMetaData, pa.Schema]:
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
    return metadata, schema


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
