"""Checks of a whole data set before anything starts; a mistake is one sentence that names the row.

Only what is light is read: footers, the `_shape` and `_dtype` columns of tensors, and text. A million rows
take seconds. What takes the content (numbers that are not finite, bytes that are missing) shows in reading.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open

from infra import storage
from infra.storage import Stored
from model.text import split_words
from model.transformer import TransformerConfig
from workers.dataset import ParquetDataset, dataset_description
from workers.model_directory import TextConfig, VideoConfig

FLOATS = ("float16", "bfloat16", "float32")


def check(
    setting: str,
    path: str,
    text: TextConfig,
    sizes: TransformerConfig | None,
    *,
    video: VideoConfig | None = None,
    longer: bool = False,
    skip_damaged: bool = False,
    encoder: str = "",
) -> list[str]:
    """What a person should know of the data set `setting` at `path`: damaged shards that are left out.

    `text` says whether prompts come as text or embedded, and `sizes` of a model which text_len and text_dim
    they must fit, if any. `video` is what videos must be, if the stage reads any: pixels where there is a
    codec, else latents; with `longer` they may be longer than `video.frames`. `skip_damaged` is as the stage
    reads. `encoder` is the digest of the model's text encoder, where that is known. ValueError, with the
    `setting`, where the data set is missing or damaged, or holds something else.
    """
    where = f"{setting} at {path}"
    columns = [text.column, *([] if video is None else [video.column])]
    data = ParquetDataset(path, columns, skip_damaged=skip_damaged)
    if text.column == "embedding":
        _check_encoder(where, dataset_description(data.schema).get("provenance", {}).get("encoder"), encoder)
        shape = (None, None) if sizes is None else (range(1, sizes.text_len + 1), sizes.text_dim)
        wanted: Wanted = ("embeddings", shape, "tokens × text_dim of the model")
        _check_tensors(data, text.column, where, wanted)
    else:
        _check_text(data, text.column, where, None if sizes is None else sizes.text_len)
    if video is not None:
        _check_videos(data, where, video, longer=longer)
    return [f"left out {data.skipped} damaged shards of {where}"] if data.skipped else []


def check_negative(prompt: str, file: str | None, sizes: TransformerConfig, encoder: str = "") -> None:
    """ValueError unless the teacher's negative prompt fits a model of these sizes, and of this text encoder:
    its text, or the tensor `embedding` [tokens, text_dim] of `file`."""
    setting = "distill.roles.teacher"
    if file is None:
        if (words := len(split_words(prompt))) > sizes.text_len:
            raise ValueError(
                f"{setting}.negative_prompt has {words} words, more than the {sizes.text_len} that the model "
                "reads; shorten it."
            )
        return
    where = f"{setting}.negative_embedding at {file}"
    try:
        with storage.fetched(file) as here, safe_open(here, "pt") as opened:
            embedding, told = opened.get_tensor("embedding").clone(), opened.metadata() or {}
    except (OSError, SafetensorError, storage.StorageError) as error:
        raise ValueError(f"{where} is no safetensors file with the tensor `embedding`: {error}.") from None
    _check_encoder(where, told.get("encoder"), encoder)
    tokens, width = embedding.shape if embedding.ndim == 2 else (0, 0)
    if not 1 <= tokens <= sizes.text_len or width != sizes.text_dim or not embedding.isfinite().all():
        raise ValueError(
            f"{where} has a tensor `embedding` of {tuple(embedding.shape)}, and finite numbers of 1 to "
            f"{sizes.text_len} × {sizes.text_dim} are expected (tokens × text_dim of the model)."
        )


def _check_encoder(where: str, theirs: str | None, models: str) -> None:
    """ValueError where both say which encoder embedded prompts, and it is not one."""
    if theirs and models and theirs != models:
        raise ValueError(
            f"{where} was embedded by another text encoder than the model's; embed its prompts anew with "
            "that."
        )


def _check_videos(data: ParquetDataset, where: str, video: VideoConfig, *, longer: bool) -> None:
    codec = video.make_codec() if video.column == "video" else None
    shape = video.shape if codec is None else codec.shape(video.shape)
    sizes = (None, *shape[1:]) if longer else shape
    wanted: Wanted = ("videos", sizes, "`video`: [frames, channels, height, width]")
    _check_tensors(data, video.column, where, wanted, least=shape[0] if longer else 1)


Wanted = tuple[str, Sequence[int | range | None], str]
"""What tensors are, their shape (None: any size; a range: a size in it), and how to call that."""


def _check_tensors(data: ParquetDataset, name: str, where: str, wanted: Wanted, *, least: int = 1) -> None:
    """ValueError unless every tensor `name` has the shape (None: any) and a type that fits its column."""
    what, shape, asked = wanted
    types = ("uint8", *FLOATS) if name == "video" else FLOATS
    said = " × ".join(
        f"{size[0]} to {size[-1]}" if isinstance(size, range) else f"≥ {least}" if size is None else str(size)
        for size in shape
    )

    def refuse(row: str, found: Any) -> None:
        raise ValueError(f"{where} holds {what} of {found} ({row}), and {said} is expected ({asked}).")

    for shard, table, lacking in data.scan([f"{name}_shape", f"{name}_dtype"], name):
        shapes, dtypes = table[f"{name}_shape"], table[f"{name}_dtype"]
        for row in lacking + _where(pc.or_(shapes.is_null(), dtypes.is_null())):
            raise ValueError(f"{where} has no {name} in {_row(shard, row)}; every row needs one.")
        for row in _where(pc.invert(pc.is_in(dtypes, pa.array(types)))):
            what = f"{where} stores {name} as {dtypes[row]} ({_row(shard, row)})"
            raise ValueError(f"{what}; use {' or '.join(types)}.")
        for row in _where(pc.not_equal(pc.list_value_length(shapes), len(shape))):
            refuse(_row(shard, row), shapes[row].as_py())
        sizes = pc.list_flatten(shapes).to_numpy().reshape(-1, len(shape))
        fits = [
            np.isin(sizes[:, axis], size)
            if isinstance(size, range)
            else (sizes[:, axis] >= least if size is None else sizes[:, axis] == size)
            for axis, size in enumerate(shape)
        ]
        for row in np.flatnonzero(~np.all(fits, axis=0)).tolist():
            refuse(_row(shard, row), shapes[row].as_py())


def _check_text(data: ParquetDataset, name: str, where: str, text_len: int | None) -> None:
    """ValueError unless every row has a text, of at most `text_len` words."""
    for shard, table, _ in data.scan([name], name):
        texts = table[name]
        if pa.types.is_dictionary(texts.type):
            texts = texts.cast(texts.type.value_type)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise ValueError(f"{where} stores {name} as {texts.type} ({shard.name}); it must be text.")
        for row in _where(texts.is_null()):
            raise ValueError(f"{where} has no {name} in {_row(shard, row)}; every row needs one.")
        if text_len is None:
            continue
        # Few prompts are so long that their words must be counted: a word has a byte and a space at least.
        for row in _where(pc.greater(pc.binary_length(texts), 2 * text_len - 1)):
            words = len(split_words(texts[row].as_py()))
            if words > text_len:
                raise ValueError(
                    f"{where} has a {name} of {words} words ({_row(shard, row)}), more than the {text_len} "
                    "that the model reads; shorten it."
                )


def _where(mask: pa.ChunkedArray) -> list[int]:
    """The rows where the mask is true."""
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist() if pc.any(mask).as_py() else []


def _row(shard: Stored, row: int) -> str:
    return f"row {row} of {shard.name}"
