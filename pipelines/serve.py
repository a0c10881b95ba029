"""`self-forcing serve`: the streaming endpoint, on Ray Serve."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from ray import serve

from orchestrator.cluster import connect
from orchestrator.serving.app import HOST, ServeConfig, build
from pipelines.console import say
from workers.streamer import check


def main(arguments: Sequence[str]) -> int:
    """Serve until interrupted; ValueError for settings that cannot work or a model that cannot stream."""
    parser = ArgumentParser(
        prog="self-forcing serve", description="Stream from a student.", exit_on_error=False
    )
    parser.add_class_arguments(ServeConfig, None)
    parser.add_argument(
        "--address", type=str | None, default=None, help="Ray cluster; this machine by default"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    try:
        options = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    config = ServeConfig(**{name: options[name] for name in ServeConfig.__dataclass_fields__})
    config = replace(config, model=str(Path(config.model).absolute()))
    check(config.model)
    with connect(options.address):
        serve.start(http_options={"host": HOST, "port": config.port})
        try:
            serve.run(build(asdict(config)), name="self-forcing")
            say(
                f"serve: {config.model} at http://{HOST}:{config.port}/ with {config.slots} slots; stop with Ctrl-C"
            )
            threading.Event().wait()
        finally:
            serve.shutdown()
    return 0
