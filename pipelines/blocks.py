"""Blocks of a data set, each a file that an actor of Ray Data writes; after a kill the rest is made."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
import ray

from infra import storage
from pipelines.console import Display


def block_name(*words: Any) -> str:
    """A file's name that says what is in it."""
    return f"{hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:32]}.parquet"


class Blocks:
    """The files beside a data set in the making, until it is published."""

    def __init__(self, output: str):
        """`output`: the data set's absolute path or s3:// address."""
        above, _, name = output.rpartition("/")
        self._place = f"{above}/.{name}.blocks"
        storage.clean(self._place)
        self._there = self._found()

    def _found(self) -> dict[str, storage.Stored]:
        return {file.name: file for file in storage.stored(self._place, ".parquet") or ()}

    def at(self, name: str) -> str:
        return f"{self._place}/{name}"

    def told(self, names: Collection[str]) -> str:
        """How many of these are there, in words for the end of a sentence."""
        there = len(self._there.keys() & set(names))
        return f", {there} of {len(names)} blocks are there" if there else ""

    def make(
        self,
        named: Mapping[str, Sequence[Any]],
        maker: Any,
        arguments: tuple[Any, ...],
        options: Any,
        *,
        label: str,
    ) -> None:
        """Write the files that are not there, name → content of the block.

        `maker` is a class of actors, made with `arguments`; one is called with a row {"path", "block"} and
        writes the file. `options` say how many `actors`, and the `cpus` and `gpus` of each.
        """
        missing = {self.at(name): block for name, block in named.items() if name not in self._there}
        if not missing:
            return
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        made = ray.data.from_items(
            [{"path": path, "block": list(block)} for path, block in missing.items()],
            override_num_blocks=len(missing),
        ).map(
            maker,
            fn_constructor_args=arguments,
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            compute=ray.data.ActorPoolStrategy(size=min(options.actors, len(missing))),
        )
        with Display(label, len(named), done=len(named) - len(missing)) as display:
            for _ in made.iter_rows():
                display.update(display.done + 1, {})
        self._there = self._found()

    def footers(self, names: Sequence[str]) -> list[pq.FileMetaData]:
        """What each of the files says of itself, in this order."""
        return storage.each(lambda name: _footer(self._there[name]), names)

    def gather(self, names: Sequence[str], staging: str) -> None:
        """Have the files be shards of `staging`, numbered in this order; in S3 the store copies them."""
        numbered = [(name, f"{number:05d}.parquet") for number, name in enumerate(names)]
        storage.each(lambda pair: storage.copy_file(self.at(pair[0]), staging, pair[1]), numbered)

    def discard(self) -> None:
        storage.discard(self._place)


def _footer(file: storage.Stored) -> pq.FileMetaData:
    with file.open() as opened:
        return pq.read_metadata(opened)
