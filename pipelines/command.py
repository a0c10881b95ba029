"""What a command is: its function, the settings of a recipe that it uses, and its own options."""

from dataclasses import dataclass
from typing import Any

RUN_CONFIG = "orchestrator.config:RunConfig"


class Option:
    """An argument of one command, as `add_argument` takes it.

    A `path` is a place in a file system, or, where it is `stored`, also in S3, or, where it is `registered`,
    a model of the registry too; a `preset` the name of settings that ship, or a file of such, on top of which
    others may be given.
    """

    def __init__(
        self,
        name: str,
        help: str,
        *,
        path: bool = False,
        stored: bool = False,
        registered: bool = False,
        preset: bool = False,
        required: bool = False,
        **how: Any,
    ):
        self.name, self.help, self.path, self.preset = name, help, path or stored, preset
        self.stored, self.registered = stored, registered
        positional = not name.startswith("-")
        self.is_required = required or (positional and how.get("nargs") != "?")
        self.is_flag = how.get("action") == "store_true"
        if not self.is_flag:
            how.setdefault("type", str if self.is_required or "default" in how else str | None)
        if not (self.is_flag or positional):
            how.setdefault("default", None)
        self.how = {"help": help, **how}

    @property
    def key(self) -> str:
        """Its name among the parsed options."""
        return self.name.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    function: str  # `module:function`, called with the config and the parsed options
    config: str | None = None  # `module:class` of its config, if it has one
    uses: tuple[str, ...] | None = None
    """Fields of the config that it shows and takes on the command line; all where unset."""
    recipe: bool = False  # whether a recipe may come first
    options: tuple[Option, ...] = ()
    passes_on: bool = False
    """Whether options that it does not know are its function's business, in `options.overrides`."""

    def takes(self, setting: str) -> bool:
        """Whether it takes this setting, or group of settings, of its config on the command line."""
        return self.uses is None or setting.split(".")[0] in self.uses


TRACEBACK = Option("--traceback", "show stack traces of errors", action="store_true")
ADDRESS = Option("--address", "Ray cluster; RAY_ADDRESS, or this machine, by default")
RESUME = Option("--resume", "go on from the newest complete checkpoint", action="store_true")
ALLOW_CHANGE = Option(
    "--allow-change", "setting that --resume may change; give it once for each", action="append", type=str
)
REGISTER = (
    Option("--register", "evaluate the student and make it the next version of this registered model"),
    Option("--alias", "with --register: have this alias name it, if it passes the gate"),
)
ON_RAY = (ADDRESS, RESUME)
