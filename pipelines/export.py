"""`self-forcing export`: a model, or a checkpoint of a distillation, in the layout of another tool."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import yaml

from infra import storage
from infra.settings import in_store
from model.adapters import AdapterConfig
from model.backbone import WeightSource
from model.families import shapes_of
from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from pipelines.console import say
from pipelines.recipe import fields_of, is_part
from workers.checkpoint_weights import CheckpointWeights, Shaped, Which
from workers.foreign.adapter import DIFFUSERS_FILE, ForeignAdapter, for_diffusers
from workers.foreign.writer import Format, write
from workers.model_directory import ModelCard, ModelDirectory, TextConfig, VideoConfig, save
from workers.zero import DTYPES

LAYOUTS = (*get_args(Format), "peft")
HOW_TO_LOAD = {
    "diffusers": "It loads with diffusers' `WanTransformer3DModel.from_pretrained`.",
    "wan": "It loads where a checkpoint folder of the Wan 2.1 release does.",
    "pt": "It loads where a student of Self Forcing does; `generator` and `generator_ema` are the same.",
    "peft": "It loads with `load_lora_weights` of diffusers' WanPipeline, on the base that it is of.",
}


def command(_: None, options: Any) -> None:
    """Write a folder; ValueError, before it is begun, where the model cannot be had in that layout."""
    for name, value, known in (
        ("format", options.format, LAYOUTS),
        ("dtype", options.dtype, (None, *DTYPES)),
        ("weights", options.weights, (None, *get_args(Which))),
    ):
        if value not in known:
            raise ValueError(f"--{name} is {value}; use {', '.join(filter(None, known))}.")
    with ExitStack() as held:
        path = Path(options.model)
        if in_store(options.model):
            path = held.enter_context(storage.reading(options.model))
        _write(path, options)


def _write(path: Path, options: Any) -> None:
    card, weights, what = _opened(path, options.weights, options.base)
    if options.format == "peft":
        if not (path / "adapter").is_dir():
            raise ValueError(
                f"{path} has no adapter: it is no model that was trained with one; use another --format."
            )
        adapter = ForeignAdapter(path / "adapter")
    output = options.output
    with _folder(output) as directory:
        if options.format == "peft":
            save(for_diffusers(adapter), directory / DIFFUSERS_FILE)
        else:
            write(
                weights, card.transformer, directory, options.format,
                causal=card.causal, dtype=options.dtype, save=save,
            )  # fmt: skip
        (directory / "README.md").write_text(readme(card, options.format, what), encoding="utf-8")
    say(f"export: wrote {output}, {what}. {HOW_TO_LOAD[options.format]}")


@contextmanager
def _folder(output: str) -> Iterator[Path]:
    """A directory whose files lie at `output` by their own names; ValueError where something of others does.

    Locally it is whole or not there. In S3 the README.md comes last, and nothing is replaced.
    """
    taken = ValueError(f"--output: {output} is there already; name a place where nothing is.")
    if in_store(output):
        if storage.exists(output):
            raise taken
        with storage.uploading(output, last="README.md") as directory:
            yield directory
        return
    there = Path(output)
    if there.exists() and not storage.is_complete(there) and (there.is_file() or any(there.iterdir())):
        raise taken
    staging = storage.begin(there)
    with storage.writing(staging) as directory:
        yield directory
    storage.publish(staging, there, {"export": True})


def _opened(path: Path, which: Which | None, base: str | None) -> tuple[ModelCard, WeightSource, str]:
    """A model's card and weights, and what they are in words; of a checkpoint its student's."""
    if not (path / "student").is_dir():
        for name, value in (("weights", which), ("base", base)):
            if value is not None:
                raise ValueError(f"--{name} is for checkpoints, and {path} is none; leave it out.")
        model = ModelDirectory(path)
        return model.card, model, "a causal student" if model.card.causal else "a bidirectional model"
    storage.verify(path)
    saved = storage.read_metadata(path)
    # What no other tool's layout has, VAE and text encoder, is left out.
    told = saved["identity"]
    adapters = _part(AdapterConfig, told, "distill.roles.student.adapters.")
    weights = CheckpointWeights(path / "student", which)
    card = ModelCard(
        True,
        _part(TransformerConfig, told, "student."),
        _part(VideoConfig, {**told, "video.codec": "none"}, "video."),
        TextConfig("embedded"),
        rollout=_part(RolloutConfig, told, "rollout."),
        shift=told["rollout.shift"],
        lineage={"distilled": saved["run_id"] or ""},
        recipe={"seed": told.get("seed")},
    )
    shapes = shapes_of(card.transformer)
    source = Shaped(weights, shapes, adapters, None if base is None else ModelDirectory(base))
    return card, source, f"the {weights.which} weights of a student after {saved['done']} iterations"


def _part(kind: type, told: Mapping[str, Any], prefix: str) -> Any:
    """A part of the config from an identity's settings by dotted name."""
    values = {}
    for name, hint in fields_of(kind).items():
        if is_part(hint):
            values[name] = _part(hint, told, f"{prefix}{name}.")
        elif (value := told.get(prefix + name)) is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def readme(card: ModelCard, layout: str, what: str) -> str:
    """What a person who finds the folder wants to know."""
    sizes, video = card.transformer, card.video
    blocks = [
        "# A Wan transformer exported by self-forcing",
        f"This is {what}: width {sizes.dim}, {sizes.num_layers} layers, {sizes.num_heads} heads, for latents "
        f"of {video.frames} × {video.channels} × {video.height} × {video.width} "
        f"(frames, channels, height, width). {HOW_TO_LOAD[layout]}",
    ]
    if card.rollout is not None:
        blocks.append(
            "**It is causal.** It generates chunk by chunk with a cache of keys and values, as below. "
            "diffusers has no such rollout, and its pipelines, which denoise a whole video at once, make "
            "nothing good of it. Play it with `self-forcing generate` or `self-forcing serve` after "
            "`self-forcing import`, or with the published code of Self Forcing."
        )
        blocks.append(_yaml({"rollout": asdict(card.rollout), "guidance": card.guidance}))
    if card.lineage:
        blocks.append("Tracking runs that it comes from:")
        blocks.append(_yaml(card.lineage))
    if card.selection:
        blocks.append("Chosen among the states of its run by what was measured:")
        blocks.append(_yaml(card.selection))
    if card.recipe:
        blocks.append("The recipe that made it:")
        blocks.append(_yaml(card.recipe))
    return "\n\n".join(blocks) + "\n"


def _yaml(body: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(body))  # YAML has no tuples
    return f"```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```"
