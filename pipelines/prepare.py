"""`self-forcing prepare`: the data sets of a recipe whose `data.source` makes them."""

from importlib import import_module
from typing import Any

from infra.settings import Invalid, part
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.recipe import fields_of, unknown
from pipelines.tenants import brought
from pipelines.tracked import located


def prepare(config: RunConfig) -> None:
    """Write the data sets that are not there yet, if the recipe has a source.

    Raises:
        ValueError: there is no such source, it has no such setting, or other data lies there.
    """
    sources, source, given = brought("SOURCES"), config.data.source, config.data.source_settings
    with part("data"):
        if source is None:
            if given:
                raise Invalid("source_settings", "need a data.source, which they are for.")
            return
        if source not in sources:
            raise Invalid(
                "source", f"is {source!r}; use {', '.join(sources)}, or leave it out where data is there."
            )
        module = import_module(sources[source])
        names = [f"data.source_settings.{name}" for name in fields_of(module.Settings)]
        for name in given:
            if (dotted := f"data.source_settings.{name}") not in names:
                raise unknown(dotted, names)
        with part("source_settings"):
            settings = module.Settings(**given)
    say(f"prepare: {module.prepare(config, settings)}")


def command(config: RunConfig, options: Any) -> None:
    if config.data.source is None:
        raise ValueError(
            "data.source names nothing that makes data; this recipe's data sets must be there already."
        )
    prepare(located("prepare", config))
