"""`self-forcing register`: a student becomes a version in MLflow's model registry.

With it go its recipe, its lineage, and what `evaluate` measured of it.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from infra import storage
from infra.registry import Reference, Registry, Version
from infra.tracking import tracking_uri
from orchestrator.config import RunConfig
from pipelines import suites
from pipelines.console import say
from pipelines.promote import promote
from pipelines.pyfunc import FLAVOR
from workers.streamer import check


def command(_: None, options: Any) -> None:
    """Register a model, perhaps promote it; ValueError if it cannot stream or the metrics are another's."""
    Reference(options.name, alias=options.alias)
    registry = Registry(tracking_uri(options.tracking.uri, options.root))
    experiment = options.tracking.experiment
    version = register(registry, options.name, options.model, experiment, metrics=options.metrics)
    if options.alias is not None:
        promote(registry, version, options.alias)


def check_finish(config: RunConfig, options: Any, *, prompts: bool = True) -> None:
    """ValueError, before a run starts, where its student could not be evaluated and registered.

    Without `prompts` those to evaluate with are not looked for, as their data set is still to be made.
    """
    if options.register is None:
        if options.alias is not None:
            raise ValueError("--alias moves to what --register makes; give both, or leave it out.")
        return
    Reference(options.register, alias=options.alias)
    Registry(config.tracking.uri)
    if config.rollout.window is None:
        raise ValueError("--register: the student's cache would grow for ever; set rollout.window.")
    if config.text.encoder == "embedded":
        raise ValueError(
            "--register evaluates the student, and its prompts come embedded; set text.encoder to umt5, or "
            "use `self-forcing register` afterwards."
        )
    suite = suites.find(config.evaluate.suite)
    if prompts:
        suite.prompts(config)


def finish(config: RunConfig, options: Any) -> None:
    """Register the student of a run that was evaluated, and have an alias name it if it passes the gate."""
    registry, experiment = Registry(config.tracking.uri), config.tracking.experiment
    model = f"{config.distill.output}/model"
    version = register(registry, options.register, model, experiment, metrics=config.evaluate.output)
    if options.alias is not None:
        promote(registry, version, options.alias)


def register(registry: Registry, name: str, model: str, experiment: str, *, metrics: str | None) -> Version:
    """A version of the student at `model`, perhaps with an evaluation's `metrics` file or directory.

    ValueError if it cannot stream, or the metrics are another's.
    """
    card = check(model)[0].card
    params: dict[str, Any] = {"recipe": card.recipe}
    values: dict[str, float] = {}
    with ExitStack() as held:
        directory = held.enter_context(storage.reading(model))
        files: list[Path] = []
        if metrics is not None:
            if not metrics.endswith(".json"):
                metrics = f"{metrics.rstrip('/')}/metrics.json"
            files.append(held.enter_context(storage.fetched(metrics)).absolute())
            values, params["evaluation"] = measured(files[0], model, metrics)
        version = registry.register(
            name,
            directory.absolute(),
            experiment=experiment,
            params=params,
            metrics=values,
            lineage=card.lineage,
            files=files,
            flavor=FLAVOR,
        )
    say(f"register: {model} is {version} in the registry at {registry.where}")
    return version


def measured(file: Path, model: str, where: str | None = None) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics for the gate of the weights at `model`, from an evaluation's file, and how they were measured.

    ValueError where the file, for a person at `where`, is no evaluation, or one of other weights.
    """
    manifest, where = storage.manifest_digest(model), where or str(file)
    try:
        body = json.loads(file.read_text())
        suite = body["suite"] if "suite" in body else suites.unnamed()
        settings = {"seed": body["seed"], **{name: body["settings"][name] for name in ("videos", "frames")}}
        rows = [body["rows"][name] for name, made in body["models"].items() if made["manifest"] == manifest]
        values: dict[str, float | None] = {}
        for name in suites.compared(suite) if rows else ():
            metric, _, span = name.rpartition("_")
            values[name] = rows[0][span][metric]["value"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        what = f"--metrics: there is no evaluation at {where}"
        raise ValueError(f"{what}; name what `self-forcing evaluate` wrote.") from None
    if not rows:
        what = f"--metrics: the evaluation at {where} measured other weights than those at {model}"
        raise ValueError(f"{what}; evaluate these first.")
    # One param: a promotion reads it as a whole.
    settings["suite"] = json.dumps(suite)
    return {name: value for name, value in values.items() if value is not None}, settings
