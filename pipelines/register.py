"""`self-forcing register`: a student becomes a version in MLflow's model registry.

With it go its recipe, its lineage, and what `evaluate` measured of it.
"""

import json
from pathlib import Path
from typing import Any

from infra import storage
from infra.registry import Reference, Registry
from infra.tracking import tracking_uri
from pipelines import suites
from pipelines.console import say
from pipelines.promote import promote
from workers.streamer import check


def command(_: None, options: Any) -> None:
    """Register a model, perhaps promote it; ValueError if it cannot stream or the metrics are another's."""
    Reference(options.name, alias=options.alias)
    model = Path(options.model).absolute()
    card = check(str(model))[0].card
    params: dict[str, Any] = {"recipe": card.recipe}
    metrics: dict[str, float] = {}
    files: list[Path] = []
    if options.metrics is not None:
        file = Path(options.metrics)
        file = (file / "metrics.json" if file.is_dir() else file).absolute()
        metrics, params["evaluation"] = measured(file, model)
        files.append(file)
    registry = Registry(tracking_uri(options.tracking.uri, options.root))
    version = registry.register(
        options.name,
        model,
        experiment=options.tracking.experiment,
        params=params,
        metrics=metrics,
        lineage=card.lineage,
        files=files,
    )
    say(f"register: {options.model} is {version} in the registry at {registry.where}")
    if options.alias is not None:
        promote(registry, version, options.alias)


def measured(file: Path, model: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics for the gate of the weights at `model`, from an evaluation's file, and how they were measured.

    ValueError where the file is no evaluation, or one of other weights.
    """
    manifest = storage.manifest_digest(model)
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
        what = f"--metrics: there is no evaluation at {file}"
        raise ValueError(f"{what}; name what `self-forcing evaluate` wrote.") from None
    if not rows:
        what = f"--metrics: the evaluation at {file} measured other weights than those at {model}"
        raise ValueError(f"{what}; evaluate these first.")
    # One param: a promotion reads it as a whole.
    settings["suite"] = json.dumps(suite)
    return {name: value for name, value in values.items() if value is not None}, settings
