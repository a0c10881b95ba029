"""`self-forcing serve`: the streaming endpoint, on Ray Serve."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from infra.settings import check_local
from infra.storage import Files
from infra.tracking import tracking_uri
from orchestrator.cluster import connect
from orchestrator.serving.access import check_exposure
from orchestrator.serving.app import application
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.models import locate
from pipelines.console import say
from workers.streamer import check


def command(config: ServeConfig, options: Any) -> None:
    """Serve until interrupted; ValueError for settings that cannot work or a model that cannot stream."""
    if (options.certificate is None) != (options.key is None):
        raise ValueError("certificate and key belong together; give both or neither.")
    if options.certificate is not None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ValueError(
            "with RAY_SERVE_ENABLE_HA_PROXY=1 there is no HTTPS: leave out certificate and key and let a proxy in front end TLS."
        )
    check_exposure(config.access, options.host)
    if config.registered:
        config = replace(config, registry=tracking_uri(config.registry, "."))
    else:
        check_local(config.model, "model")
        config = replace(config, model=str(Path(config.model).absolute()))
    check(str(locate(config)[1]))
    config = replace(config, videos=replace(config.videos, storage=_storage(config.videos.storage)))
    scheme = "http" if options.certificate is None else "https"
    with connect(options.address):
        serve.start(
            http_options={
                "host": options.host,
                "port": options.port,
                "ssl_certfile": options.certificate,
                "ssl_keyfile": options.key,
            }
        )
        try:
            serve.run(application(config), name="self-forcing")
            say(
                f"serve: {config.model} at {scheme}://{options.host}:{options.port}/ with {config.slots} slots a replica; stop with Ctrl-C"
            )
            threading.Event().wait()
        finally:
            serve.shutdown()


def _storage(location: str) -> str:
    """Where videos are kept, as replicas name it; ValueError where it cannot be read."""
    files = Files(location)
    try:
        files.names()
    except OSError as error:
        raise ValueError(f"videos.storage: {location} cannot be read ({error}).") from None
    return files.location
