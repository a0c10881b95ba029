"""Blocks of a data set, each a file that an actor of Ray Data writes; after a kill the rest is made."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from pipelines.console import Display


def block_name(*words: Any) -> str:
    """A file's name that says what is in it."""
    return f"{hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:32]}.parquet"


def make(
    missing: Mapping[str, Sequence[Any]],
    maker: Any,
    arguments: tuple[Any, ...],
    options: Any,
    *,
    label: str,
    done: int,
    total: int,
) -> None:
    """Write the files that are `missing`, path → content of the block.

    `maker` is a class of actors, made with `arguments`; one is called with a row {"path", "block"} and writes
    the file. `options` say how many `actors`, and the `cpus` and `gpus` of each. Shown is how many of `total`
    blocks there are.
    """
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
    with Display(label, total, done=done) as display:
        for _ in made.iter_rows():
            display.update(display.done + 1, {})
