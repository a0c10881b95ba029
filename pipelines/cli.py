"""The command line: `self-forcing COMMAND [RECIPE] [--dotted.overrides …]`.

A recipe is a YAML file, or the name of one that ships with the package, and may start from another one, its `base`; every setting of the run config can be overridden with a dotted option.
A user's mistake is one sentence and exit code 2; a run that had to stop (a loss that is not finite, a lost actor) is one sentence and exit code 1.
"""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Before Ray or DeepSpeed are imported, by this process or by one that it starts.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
warnings.filterwarnings("ignore", category=FutureWarning)

import yaml  # noqa: E402
from jsonargparse import ArgumentError, ArgumentParser  # noqa: E402

from infra.tracking import TrackingConfig  # noqa: E402
from orchestrator.config import RunConfig  # noqa: E402

RECIPES = Path(__file__).parent / "recipes"
EXPERIMENTS = Path(__file__).parent / "experiments"
COMMANDS = {
    "prepare": "write the moving-digit data sets",
    "pretrain": "train the bidirectional teacher",
    "initialize": "make the initial student from the teacher's ODE pairs",
    "distill": "Self Forcing: distil the student from teacher and critic",
    "generate": "make a video from a prompt",
    "evaluate": "measure teacher, initial and distilled student, as far as they are there",
    "run": "all stages that are not done yet, then evaluate",
    "experiment": "train and measure every cell of an experiment, such as exposure-bias",
    "serve": "stream a student to many viewers at once",
    "register": "make a student the next version of a registered model",
    "promote": "move an alias to a version that is no worse than the one it names, or roll back",
    "submit": "run a command as a Ray job on a cluster",
}


def shipped(name: str, folder: Path = RECIPES) -> Path:
    """A recipe or experiment by path, or by the name of one that ships with the package; ValueError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ValueError(f"there is no {folder.name[:-1]} {name!r}; name a YAML file or one of {names}.")


def recipe_arguments(name: str, seen: tuple[Path, ...] = ()) -> list[str]:
    """Options that read a recipe, after the one that it names as its `base`."""
    path = shipped(name)
    body = yaml.safe_load(path.read_text())
    if not isinstance(body, dict) or "base" not in body:
        return ["--config", str(path)]
    if path in seen:
        raise ValueError(f"the recipe {path} is its own base.")
    base = recipe_arguments(body.pop("base"), (*seen, path))
    return [*base, "--config", yaml.safe_dump(body)]


def config_parser(command: str) -> ArgumentParser:
    """A parser of every setting of the run config, plus what concerns this call alone."""
    parser = ArgumentParser(
        prog=f"self-forcing {command}", description=COMMANDS[command].capitalize() + ".", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="recipe file")
    parser.add_class_arguments(RunConfig, None, sub_configs=False)
    call = parser.add_argument_group("this call")
    call.add_argument(
        "--address",
        type=str | None,
        default=None,
        help="Ray cluster; RAY_ADDRESS, or this machine, by default",
    )
    call.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    call.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    if command == "evaluate":
        call.add_argument(
            "--export-vbench",
            type=str | None,
            default=None,
            help="directory for MP4s under the names that VBench expects",
        )
    if command == "generate":
        call.add_argument("--model", type=str, help="directory of a student")
        call.add_argument("--prompt", type=str, help="what the video shows")
        call.add_argument(
            "--frames", type=int | None, default=None, help="latent frames; the trained length by default"
        )
        call.add_argument(
            "--image", type=str | None, default=None, help="file of the first frame, for image-to-video"
        )
        call.add_argument(
            "--output", type=str, default="outputs/sample.mp4", help="path ending in .mp4 or .gif"
        )
    return parser


def registry_parser(command: str) -> ArgumentParser:
    """A parser of where the model registry is, for commands that take no recipe."""
    parser = ArgumentParser(
        prog=f"self-forcing {command}", description=COMMANDS[command].capitalize() + ".", exit_on_error=False
    )
    parser.add_argument(
        "--tracking.uri",
        type=str | None,
        default=None,
        help="MLflow: sqlite:///path/to/mlflow.db or http://host:port",
    )
    parser.add_argument(
        "--root", type=str, default=".", help="directory whose outputs/mlflow.db it is where no URI is given"
    )
    parser.add_argument("--traceback", action="store_true", help="show stack traces of errors")
    return parser


def parse_registry(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[str | None, Any]:
    """The tracking URI, chosen as for any other command, and the call's own options."""
    try:
        options = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(explain(str(error), list(parser.get_defaults().keys()))) from None
    return RunConfig(
        root=options.root, tracking=TrackingConfig(options.tracking.uri)
    ).located().tracking.uri, options


def parse(command: str, arguments: Sequence[str]) -> tuple[RunConfig, Any]:
    """The run config and the call's own options."""
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = recipe_arguments(arguments[0])
    parser = config_parser(command)
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explain(str(error), settings(RunConfig))) from None
    return compose(RunConfig, options), options


def compose(kind: Any, values: Any, prefix: str = "") -> Any:
    """The config of type `kind` from parsed values; a part that refuses its values says so under its dotted name."""
    nested = {f.name: type(f.default) for f in fields(kind) if is_dataclass(f.default)}
    arguments = {
        f.name: compose(nested[f.name], values[f.name], f"{prefix}{f.name}.")
        if f.name in nested
        else values[f.name]
        for f in fields(kind)
    }
    try:
        return kind(**arguments)
    except ValueError as error:
        named = str(error).split()[0] in arguments
        raise ValueError(f"{prefix}{error}" if named else str(error)) from error


def explain(message: str, known: Sequence[str]) -> str:
    """The parser's complaint as one sentence, with the nearest of the `known` settings where a key is unknown."""
    message = re.sub(r"\s+", " ", message).strip().rstrip(".")
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(
        r"Group '([\w.]+)' does not accept option '([\w.]+)'", message
    )
    unknown = unknown or re.search(
        r"[Kk]ey '([\w.]+)' is not expected|option '([\w.]+)' is not accepted", message
    )
    if unknown is None:
        wrong = re.match(r'Parser key "([\w.]+)": (.*)', message)
        return f"{wrong[1]}: {wrong[2]}." if wrong else f"{message}."
    key = ".".join(part for part in unknown.groups() if part)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"there is no setting {key}; the nearest is {close[0]}."


def settings(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a config type."""
    names = []
    for f in fields(kind):
        nested = f.default if is_dataclass(f.default) else None
        names += settings(type(nested), f"{prefix}{f.name}.") if nested is not None else [prefix + f.name]
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: self-forcing COMMAND [RECIPE] [--dotted.setting VALUE …]\n\ncommands:")
        print("\n".join(f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()))
        print("\n`self-forcing COMMAND --help` lists every setting.")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r}; use one of {', '.join(COMMANDS)}.")
        from pipelines import stages

        return stages.dispatch(command, rest)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2, rest)
    except (FloatingPointError, RuntimeError) as error:
        return _fail(error, 1, rest)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _fail(error: BaseException, code: int, arguments: Sequence[str]) -> int:
    if "--traceback" in arguments:
        raise error
    print(f"self-forcing: {str(error).strip()}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
