"""An experiment: a YAML file of a recipe, settings that all cells share, seeds, and cells with their own."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from infra.settings import place
from orchestrator.config import RunConfig
from pipelines.cli import parse
from pipelines.recipe import EXPERIMENTS, beside, check_names, read_yaml, settings, shipped

REFERENCES = ("real", "teacher", "initial")
"""What is measured once, beside the cells."""


@dataclass(frozen=True)
class Cell:
    """One way to train a model."""

    name: str
    title: str
    stage: Literal["initialize", "distill"]
    group: str
    """What the table compares: cells of one group share a colour."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """What `experiments/NAME.yaml` says."""

    name: str
    title: str
    recipe: str
    results: str
    """Directory, below `root`, of the measurements, the pictures and (with `.md`) the report."""
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


def open_experiment(name: str) -> Experiment:
    """An experiment by path, or by the name of one that ships with the package; ValueError for another."""
    path = shipped(name, EXPERIMENTS)
    body = read_yaml(path)
    check_names(body, Experiment, source=f" (in {path})")
    cells = body.get("cells")
    if not (isinstance(cells, dict) and cells and all(isinstance(cell, dict) for cell in cells.values())):
        raise ValueError(
            f"{path} is not an experiment: cells must hold settings by name, like `a: {{title: A}}`."
        )
    body |= {"name": path.stem, "cells": [{"name": name, **cell} for name, cell in cells.items()]}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment, "experiment")
    try:
        experiment = parser.instantiate(parser.parse_object({"experiment": body})).experiment
    except ArgumentError as error:
        raise ValueError(
            f"{path} is not an experiment: {' '.join(str(error).split()).rstrip('.')}."
        ) from None
    if not experiment.seeds:
        raise ValueError(f"{path} is not an experiment: seeds is empty; name one at least.")
    results = place(experiment.results, "results", stored=False)
    return replace(experiment, recipe=str(beside(experiment.recipe, path)), results=results)


def as_options(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested settings as dotted options."""
    leaves = set(settings(RunConfig))
    for name, value in values.items():
        dotted = prefix + name
        if isinstance(value, Mapping) and dotted not in leaves:
            yield from as_options(value, f"{dotted}.")
        else:
            yield f"--{dotted}={json.dumps(value) if not isinstance(value, str) else value}"


def config_of(experiment: Experiment, cell: Cell | None, seed: int, overrides: Sequence[str]) -> RunConfig:
    """The resolved config of one cell, or of what all of them share; checked as any command's."""
    folder = f"outputs/{experiment.name}"
    where = f"{folder}/references" if cell is None else f"{folder}/{cell.name}/{seed}"
    arguments = [experiment.recipe, *as_options(experiment.settings)]
    arguments += [f"--initialize.output={folder}/initial", f"--distill.student={folder}/initial/model"]
    arguments.append(f"--tracking.experiment={experiment.name}")
    if cell is not None:
        arguments += [*as_options(cell.settings), f"--{cell.stage}.output={where}"]
    arguments += [f"--evaluate.output={where}", *overrides, f"--seed={seed}"]
    config, _ = parse("run", arguments)
    return config.located()
