"""The commands: for each name what it does, which settings of a recipe it uses, and its own options.

A command is an entry of `COMMANDS`. Its function lives in a file of its own, is imported when the command is used (Ray,
torch and DeepSpeed take seconds), and is called with the config and the parsed options. To give a command another
option, add an `Option` to its entry and read it from `options`. This module imports none of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUN_CONFIG = "orchestrator.config:RunConfig"


class Option:
    """An argument of one command, as `add_argument` takes it; a `path` is a place in a file system."""

    def __init__(self, name: str, *, path: bool = False, required: bool | None = None, **how: Any):
        self.name, self.path, self.how = name, path, how
        positional = not name.startswith("-")
        self.is_required = positional and how.get("nargs") != "?" if required is None else required

    @property
    def key(self) -> str:
        """Its name among the parsed options."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def is_flag(self) -> bool:
        return self.how.get("action") == "store_true"


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    function: str
    """`module:function`."""
    config: str | None = None
    """`module:class` of its config, if it has one."""
    uses: tuple[str, ...] | None = None
    """Fields of the config that it shows and takes on the command line; all where unset."""
    recipe: bool = False
    """Whether a recipe may come first."""
    options: tuple[Option, ...] = ()
    passes_on: bool = False
    """Whether options that it does not know are its function's business, in `options.overrides`."""

    def takes(self, setting: str) -> bool:
        """Whether it takes this setting, or group of settings, of its config on the command line."""
        return self.uses is None or setting.split(".")[0] in self.uses


TRACEBACK = Option("--traceback", action="store_true", help="show stack traces of errors")
ADDRESS = Option(
    "--address", type=str | None, default=None, help="Ray cluster; RAY_ADDRESS, or this machine, by default"
)
RESUME = Option("--resume", action="store_true", help="go on from the newest complete checkpoint")
ON_RAY = (ADDRESS, RESUME)
REGISTRY = (
    Option(
        "--tracking.uri",
        type=str | None,
        default=None,
        help="MLflow: sqlite:///path/to/mlflow.db or http://host:port; MLFLOW_TRACKING_URI by default",
    ),
    Option(
        "--root",
        path=True,
        type=str,
        default=".",
        help="directory whose outputs/mlflow.db it is where no URI is given",
    ),
)
MODELS = ("seed", "root", "video", "text", "teacher", "student", "rollout", "data", "tracking")


def _stage(help: str, function: str, uses: tuple[str, ...] | None, *options: Option) -> Command:
    return Command(help, function, RUN_CONFIG, uses, recipe=True, options=(*ON_RAY, *options))


COMMANDS: Mapping[str, Command] = {
    "prepare": _stage(
        "write the moving-digit data sets",
        "pipelines.digits.prepare:command",
        ("seed", "root", "data", "video"),
    ),
    "pretrain": _stage(
        "train the bidirectional teacher", "pipelines.pretrain:command", (*MODELS, "pretrain")
    ),
    "initialize": _stage(
        "make the initial student, from the teacher's ODE pairs or from data",
        "pipelines.initialize:command",
        (*MODELS, "initialize", "distill"),
    ),
    "distill": _stage(
        "Self Forcing: distil the student from teacher and critic",
        "pipelines.distill:command",
        (*MODELS, "score", "distill", "placement"),
    ),
    "generate": Command(
        "make a video from a prompt",
        "pipelines.generate:command",
        options=(
            Option(
                "--model", path=True, required=True, type=str, default=None, help="directory of a student"
            ),
            Option("--prompt", required=True, type=str, default=None, help="what the video shows"),
            Option(
                "--frames", type=int | None, default=None, help="latent frames; the trained length by default"
            ),
            Option("--seed", type=int, default=0, help="another one makes another video"),
            Option(
                "--image",
                path=True,
                type=str | None,
                default=None,
                help="file of the first frame, for image-to-video",
            ),
            Option(
                "--output",
                path=True,
                type=str,
                default="outputs/sample.mp4",
                help="path ending in .mp4 or .gif",
            ),
        ),
    ),
    "evaluate": _stage(
        "measure teacher, initial and distilled student, as far as they are there",
        "pipelines.evaluate:command",
        (*MODELS, "distill", "evaluate", "placement"),
        Option(
            "--export-vbench",
            path=True,
            type=str | None,
            default=None,
            help="directory for MP4s under the names that VBench expects",
        ),
    ),
    "run": _stage("all stages that are not done yet, then evaluate", "pipelines.run:command", None),
    "experiment": Command(
        "train and measure every cell of an experiment, such as exposure-bias",
        "pipelines.digits.experiment:command",
        options=(
            Option("name", type=str, help="experiment file, or the name of one that ships with the package"),
            *ON_RAY,
        ),
        passes_on=True,
    ),
    "serve": Command(
        "stream a student to many viewers at once",
        "pipelines.serve:command",
        "orchestrator.serving.config:ServeConfig",
        options=(
            Option(
                "--host",
                type=str,
                default="127.0.0.1",
                help="address to listen on; others than this machine's need tokens",
            ),
            Option("--port", type=int, default=8000, help="port to listen on"),
            Option("--certificate", path=True, type=str | None, default=None, help="PEM file, for HTTPS"),
            Option(
                "--key",
                path=True,
                type=str | None,
                default=None,
                help="PEM file of the certificate's key",
            ),
            ADDRESS,
        ),
    ),
    "register": Command(
        "make a student the next version of a registered model",
        "pipelines.register:command",
        options=(
            Option("model", path=True, type=str, help="directory of a student"),
            Option(
                "--name",
                required=True,
                type=str,
                default=None,
                help="registered model, made if there is none",
            ),
            Option(
                "--metrics",
                path=True,
                type=str | None,
                default=None,
                help="evaluate.output, or its metrics.json, of this student",
            ),
            Option(
                "--alias",
                type=str | None,
                default=None,
                help="promote the version to this alias, through the same gate",
            ),
            Option(
                "--tracking.experiment",
                type=str,
                default="self-forcing",
                help="MLflow experiment of its run",
            ),
            *REGISTRY,
        ),
    ),
    "promote": Command(
        "move an alias to a version that is no worse than the one it names, or roll back",
        "pipelines.promote:command",
        options=(
            Option("name", type=str, help="registered model"),
            Option("version", type=int | None, nargs="?", help="version to promote"),
            Option("--alias", type=str, default="serving", help="alias to move"),
            Option(
                "--margin",
                type=float | None,
                default=None,
                help="by how much each metric may be worse; null takes the suite's own margins",
            ),
            Option("--ungated", action="store_true", help="promote without comparing any metric"),
            Option("--rollback", action="store_true", help="return to the version before the last promotion"),
            *REGISTRY,
        ),
    ),
    "submit": Command(
        "run a command as a Ray job on a cluster, follow it, or stop it",
        "pipelines.submit:command",
        options=(
            Option(
                "recipe",
                type=str | None,
                nargs="?",
                help="recipe file, or the name of one that ships with the package",
            ),
            Option("--command", type=str, default="distill", help="what the job runs"),
            Option(
                "--address",
                type=str | None,
                default=None,
                help="job server, http://host:8265; RAY_API_SERVER_ADDRESS by default",
            ),
            Option("--no-wait", action="store_true", help="do not follow the job"),
            Option("--retries", type=int, default=0, help="hand a failed job in again, with --resume"),
            Option("--follow", type=str | None, default=None, help="follow the job with this id"),
            Option("--stop", type=str | None, default=None, help="stop the job with this id"),
        ),
        passes_on=True,
    ),
}
