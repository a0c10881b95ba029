"""`self-forcing prepare-videos`: a folder of video files and their captions, as a data set for training.

Files are taken in blocks, each a shard that is named by what is in it. A run that was killed finds its shards
again and makes the rest. A file that cannot be read is left out and listed with the reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra import storage
from infra.settings import absolute
from infra.storage import Stored
from model.text import split_words
from model.umt5 import Tokenizer, Umt5Encoder, digest
from orchestrator.cluster import connect
from orchestrator.config import RunConfig
from pipelines import tables
from pipelines.blocks import Blocks, block_name
from pipelines.console import say
from pipelines.tables import read_rows
from workers.dataset import dataset_schema, encode_tensor, tensor_fields
from workers.model_directory import TextConfig, VideoConfig
from workers.video_files import ClipShape, clips

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
BLOCK = 16
"""Files of a shard: a clip of 21 latent frames of 480 × 832 is 4.2 MB."""
DAMAGED, LEFT_OUT = "damaged.jsonl", b"self_forcing_left_out"
SHOWN = 3


def command(config: RunConfig, options: Any) -> None:
    """Write a data set; ValueError, before anything starts, where videos, captions, the recipe's VAE or its
    text encoder cannot be read."""
    for name in ("actors", "clips"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    config = config.located()
    video, text = config.video, config.text
    video.check()
    codec = video.make_codec()
    if codec is None or text.encoder == "embedded":
        setting = "video.codec none" if codec is None else "text.encoder embedded"
        raise ValueError(f"{setting} makes nothing of videos and captions; use the one that training uses.")
    frames, channels, height, width = codec.shape(video.shape)
    if options.scenes and find_spec("scenedetect") is None:
        raise ValueError("--scenes needs PySceneDetect; install it with pip install 'self-forcing[scenes]'.")
    shape = ClipShape(frames, channels, height, width, video.fps, options.scenes)
    if options.videos.endswith(tables.SUFFIXES):
        if options.captions is not None:
            raise ValueError("--captions: the table of --videos has them; leave it out.")
        captions = listed(options.videos)
    else:
        captions = found_below(options.videos, options.captions)
    files = list(captions)
    _check_lengths(captions, text, config.student.text_len)
    made_by = {
        "codec": video.codec_digest() or video.codec,
        "encoder": "" if text.path is None else digest(text.path),
        "shape": vars(shape),
        "clips": options.clips,
    }
    rows = [(*astuple(file), captions[file]) for file in files]
    identity = {**made_by, "files": block_name(rows)}
    output = absolute(options.output)
    if storage.is_complete(output) and storage.read_metadata(output).get("identity") == identity:
        say(f"prepare-videos: {output} is there already.")
        return
    blocks = Blocks(output)
    cut = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
    named = {block_name(made_by, block): [json.dumps(row) for row in block] for block in cut}
    already = blocks.told(named)
    say(f"prepare-videos: {len(files)} files, clips of {frames} × {height} × {width}{already}")
    with connect(options.address):
        arguments = (video, text, config.student.text_len, shape, options.clips)
        blocks.make(named, _Maker, arguments, options, label="prepare-videos")
    _publish(blocks, list(named), output, identity)
    blocks.discard()


def _publish(blocks: Blocks, names: Sequence[str], output: str, identity: Mapping[str, Any]) -> None:
    left_out: list[dict[str, str]] = []
    rows = 0
    for metadata in blocks.footers(names):
        rows += metadata.num_rows
        left_out += json.loads(metadata.metadata[LEFT_OUT])
    if not rows:
        raise ValueError(f"none of the videos could be read: {_told(left_out)}.")
    staging = storage.begin(output)
    with storage.writing(staging) as directory:
        (directory / DAMAGED).write_text("".join(f"{json.dumps(each)}\n" for each in left_out))
    blocks.gather(names, staging)
    storage.publish(staging, output, {"identity": identity})
    say(f"prepare-videos: wrote {rows} clips into {output}.")
    if left_out:
        where = f"{output}/{DAMAGED}"
        say(f"prepare-videos: left out {len(left_out)} files, listed in {where}: {_told(left_out)}.")


def _told(left_out: Sequence[Mapping[str, str]]) -> str:
    first = "; ".join(f"{each['video']}: {each['why']}" for each in left_out[:SHOWN])
    return first + (f" … ({len(left_out)} in all)" if len(left_out) > SHOWN else "")


def listed(table: str) -> dict[Stored, str]:
    """Files → captions of a table whose column `video` has paths (from its folder, or absolute) or s3://
    addresses; ValueError where one is not there, or has no caption."""
    with storage.fetched(table) as opened:
        rows = _rows(opened, table, "--videos")
    above = absolute(table).rpartition("/")[0]
    places = [str(row["video"]) for row in rows]
    wholes = [place if place.startswith(("/", "s3://")) else f"{above}/{place}" for place in places]
    files = storage.each(storage.stored_file, wholes)
    absent = [place for place, file in zip(places, files, strict=True) if file is None]
    if absent:
        raise ValueError(f"{len(absent)} of {len(files)} videos of {table} are not there, first {absent[0]}.")
    there = [file for file in files if file is not None]
    captions = [" ".join(str(row["caption"] or "").split()) for row in rows]
    return _captioned(dict(zip(there, captions, strict=True)), f"{table} must have one of each")


def found_below(videos: str, table: str | None) -> dict[Stored, str]:
    """Files → captions of all videos below a folder, in tars there, or in the tar at `videos` itself.

    Captions are in `table` (with the columns `video`, a path from the folder, and `caption`), or in the file
    beside each video: its name with .txt, or .json with the key `caption`. ValueError where a video has none.
    """
    found = storage.stored_below(videos)
    if found is None and (one := storage.stored_file(videos)) is not None:
        found = [one]
    if found is None:
        raise ValueError(f"--videos: there is nothing at {videos}.")
    try:
        for archive in [file for file in found if file.name.endswith(".tar")]:
            found += archive.members()
    except ValueError as error:
        raise ValueError(f"--videos: {error}; write it again, or leave it out.") from None
    files = [file for file in found if file.name.lower().endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"--videos: there is no video at {videos}; known are {', '.join(SUFFIXES)}.")
    if table is None:
        beside = {str(file): file for file in found if file.name.endswith((".txt", ".json"))}

        def read(file: Stored) -> str:
            stem = str(file).rpartition(".")[0]
            words = beside.get(f"{stem}.txt") or beside.get(f"{stem}.json")
            return "" if words is None else _caption(words)

        captions = dict(zip(files, storage.each(read, files), strict=True))
        return _captioned(captions, "give each a text file of its name, or name a table with --captions")
    with storage.fetched(table) as opened:
        rows = {str(row["video"]): row["caption"] for row in _rows(opened, table, "--captions")}
    root = absolute(videos).rstrip("/")
    names = {file: str(file).removeprefix(root).lstrip("/") for file in files}
    captions = {file: " ".join(str(rows.get(name) or "").split()) for file, name in names.items()}
    return _captioned(captions, f"{table} must have a caption of each in the columns video and caption")


def _caption(file: Stored) -> str:
    with file.open() as opened:
        text = bytes(opened.read()).decode("utf-8", "replace")
    if file.name.endswith(".json"):
        try:
            text = str(json.loads(text).get("caption") or "")
        except (ValueError, AttributeError):
            text = ""
    return " ".join(text.split())


def _captioned(captions: dict[Stored, str], where: str) -> dict[Stored, str]:
    without = [str(file) for file, caption in captions.items() if not caption]
    if without:
        count = f"{len(without)} of {len(captions)} videos have no caption"
        raise ValueError(f"{count}, first {without[0]}; {where}.")
    return captions


def _rows(file: Path, table: str, option: str) -> list[dict[str, Any]]:
    try:
        return read_rows(file, ("video", "caption"))
    except KeyError:
        why = "it lacks the columns video and caption in some row"
    except ValueError as error:
        why = str(error)
    raise ValueError(f"{option}: {table} cannot be read: {why}.")


def _check_lengths(captions: Mapping[Stored, str], text: TextConfig, text_len: int) -> None:
    tokenizer = None if text.path is None else Tokenizer(text.path, text_len)
    for file, caption in captions.items():
        try:
            if tokenizer is not None:
                tokenizer.tokens(caption)
            elif (words := len(split_words(caption))) > text_len:
                raise ValueError(f"it has {words} words, more than the {text_len} that the model reads")
        except ValueError as error:
            raise ValueError(f"the caption of {file}: {str(error).rstrip('.')}.") from None


class _Maker:
    """A Ray Data actor that writes shards."""

    def __init__(self, video: VideoConfig, text: TextConfig, text_len: int, shape: ClipShape, most: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.shape, self.most, self.column = shape, most, video.column
        codec = video.make_codec()
        assert codec is not None, "which is checked"
        self.codec = codec
        self.encoder = None if text.path is None else Umt5Encoder(text.path, text_len, device)
        fields = [pa.field("prompt", pa.string()), *tensor_fields(self.column)]
        fields += tensor_fields("embedding") if self.encoder else []
        told = {"encoder": "" if text.path is None else digest(text.path)}
        self.schema = dataset_schema(fields, kind="videos", provenance=told)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        left_out = []
        with storage.write_file(row["path"]) as path, pq.ParquetWriter(path, self.schema) as writer:
            for *place, caption in map(json.loads, row["block"]):
                file = Stored(*place)
                words: dict[str, Any] = {"prompt": caption}
                if self.encoder is not None:
                    words |= encode_tensor("embedding", self.encoder.embed([caption])[0].bfloat16())
                try:
                    for clip in clips(file, self.shape, self.most):
                        columns = words | encode_tensor(self.column, self._stored(clip))
                        # A row group each: memory does not grow with the length of a video.
                        writer.write_table(pa.Table.from_pylist([columns], schema=self.schema))
                except ValueError as error:
                    left_out.append({"video": str(file), "why": str(error)})
            writer.add_key_value_metadata({LEFT_OUT: json.dumps(left_out).encode()})
        return {"left_out": len(left_out)}

    def _stored(self, clip: Any) -> torch.Tensor:
        pixels = torch.from_numpy(clip)
        if self.column == "video":
            return pixels
        return self.codec.encode(pixels[None].float() / 127.5 - 1)[0].bfloat16()
