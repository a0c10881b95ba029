"""`self-forcing serve`: the streaming endpoint, on Ray Serve."""

import os
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from ray import serve

from infra.files import Files
from orchestrator.cluster import connect
from orchestrator.serving.access import check_exposure
from orchestrator.serving.app import application
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.models import locate
from pipelines.console import say
from workers.streamer import check


def main(arguments: Sequence[str]) -> int:
    """Serve until interrupted; ValueError for settings that cannot work or a model that cannot stream."""
    parser = ArgumentParser(
        prog="self-forcing serve", description="Stream from a student.", exit_on_error=False
    )
    parser.add_class_arguments(ServeConfig, None)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's need tokens"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--certificate", type=str | None, default=None, help="PEM file, for HTTPS")
    parser.add_argument("--key", type=str | None, default=None, help="PEM file of the certificate's key")
    parser.add_argument(
        "--address", type=str | None, default=None, help="Ray cluster; this machine by default"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    try:
        options = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    settings = parser.instantiate_classes(options)
    config = ServeConfig(**{each.name: settings[each.name] for each in fields(ServeConfig)})
    if (options.certificate is None) != (options.key is None):
        raise ValueError("certificate and key belong together; give both or neither.")
    if options.certificate is not None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ValueError(
            "with RAY_SERVE_ENABLE_HA_PROXY=1 there is no HTTPS: leave out certificate and key and let a proxy in front end TLS."
        )
    check_exposure(config.access, options.host)
    if not config.registered:
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
    return 0


def _storage(location: str) -> str:
    """Where videos are kept, as replicas name it; ValueError where it cannot be read."""
    files = Files(location)
    try:
        files.names()
    except OSError as error:
        raise ValueError(f"videos.storage: {location} cannot be read ({error}).") from None
    return files.location
