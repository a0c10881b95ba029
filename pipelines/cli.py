"""The command line: `self-forcing COMMAND [RECIPE] [--dotted.overrides …]`.

A user's mistake is one sentence and exit code 2; a run that had to stop (a loss that is not finite, a lost
actor) is one sentence and exit code 1. Names of settings and options are looked up here, before the parser,
which then only reads values: so the nearest name can be given, and what a command does not use refused.
"""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any

# Before Ray or DeepSpeed are imported, by this process or by one that it starts.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
# Whether nodes are being drained is looked at by the driver, in every stage.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# A proxy that the environment names cannot reach services of this machine, such as a tracking server.
_direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{_direct},localhost,127.0.0.1,::1".lstrip(",")
warnings.filterwarnings("ignore", category=FutureWarning)

from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, set_parsing_settings  # noqa: E402

from infra.settings import part, place  # noqa: E402
from pipelines.command import RESUME, TRACEBACK  # noqa: E402
from pipelines.commands import COMMANDS  # noqa: E402
from pipelines.recipe import (  # noqa: E402
    PRESETS,
    check_names,
    fields_of,
    find,
    is_part,
    parse_yaml,
    recipe_arguments,
    settings,
    shipped,
    shown,
    unknown,
)

HELP = ("-h", "--help", "--print_config")


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """The config of the command `name`, if it has one, and the call's options; ValueError for a mistake."""
    command = COMMANDS[name]
    kind = resolve_name(command.config) if command.config else None
    arguments = list(arguments)
    if command.recipe and arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--config", arguments[0]]
    own, overrides = _checked(name, arguments, kind)
    try:
        options = _parser(name, helps=bool(set(own) & set(HELP))).parse_args(own)
    except ArgumentError as error:
        raise ValueError(f"{shown(' '.join(str(error).split()), 300).rstrip('.')}.") from None
    for option in command.options:
        value = options[option.key] if option.path else None
        if value is not None and not (option.registered and value.startswith("models:/")):
            options[option.key] = place(value, option.name, stored=option.stored)
    if command.passes_on:
        options["overrides"] = overrides
    return (compose(kind, options) if kind else None), options


def compose(kind: Any, values: Any) -> Any:
    """The config of type `kind` from parsed values; a part refuses its values under its dotted name."""
    arguments = {}
    for name, hint in fields_of(kind).items():
        if is_part(hint):
            with part(name):
                arguments[name] = compose(hint, values[name])
        else:
            arguments[name] = values[name]
    return kind(**arguments)


def _overview() -> ArgumentParser:
    """The commands, listed."""
    parser = ArgumentParser(
        prog="self-forcing",
        description="Train and serve real-time autoregressive video generators by Self Forcing.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=command.help)
    return parser


@cache
def _parser(name: str, *, helps: bool) -> ArgumentParser:
    """The parser of one command. It reads every setting of the config, and shows those of the command."""
    if helps:  # what each field's docstring says, which takes a second to read
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    kind = resolve_name(command.config) if command.config else None
    description = f"{command.help[0].upper()}{command.help[1:]}."
    parser = ArgumentParser(prog=f"self-forcing {name}", description=description, exit_on_error=False)
    if kind is not None:
        if command.recipe:
            parser.add_argument("--config", action="config", help="recipe, which may also come first")
        elif any(option.preset for option in command.options):
            parser.add_argument("--config", action="config", help=SUPPRESS)
        parser.add_class_arguments(kind, None, sub_configs=False)
        for action in parser._actions:
            if find(kind, action.dest) is not None and not command.takes(action.dest):
                action.help = SUPPRESS
    call = parser.add_argument_group("this call")
    for option in (*command.options, TRACEBACK):
        call.add_argument(option.name, **option.how)
    return parser


def _checked(name: str, arguments: list[str], kind: type | None) -> tuple[list[str], list[str]]:
    """The command's own arguments, with recipes read, and those passed on; ValueError for a wrong name."""
    command = COMMANDS[name]
    options = {option.name: option for option in (*command.options, TRACEBACK)}
    own: list[str] = []
    overrides: list[str] = []
    given: set[str] = set()
    positionals = [each for each in options if not each.startswith("-")]
    rest = list(arguments)
    while rest:
        words = [rest.pop(0)]
        key, equals, value = words[0].partition("=")
        setting = key.removeprefix("--").removesuffix("+")
        bare = key in HELP or (key in options and options[key].is_flag)
        if key.startswith("--") and not (equals or bare) and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            words.append(value)
        if not key.startswith("-"):
            given |= {positionals.pop(0)} if positionals else set()
            own += words
        elif key in options or key in HELP:
            if key in options and options[key].preset and kind is not None:
                own[:0] = recipe_arguments(shipped(value, PRESETS), kind, folder=PRESETS)
            given.add(key)
            own += words
        elif key == "--config" and command.recipe and kind is not None:
            own += recipe_arguments(shipped(value), kind)
        elif command.passes_on:
            overrides += words
        elif kind is None or (hint := find(kind, setting)) is None:
            known = [each for each in settings(kind) if command.takes(each)] if kind else []
            raise unknown(setting, [*known, *(each.lstrip("-") for each in options)])
        elif not command.takes(setting):
            raise ValueError(f"{name} does not use {setting}; leave it out, or set it in the recipe.")
        else:
            if is_part(hint):
                check_names({setting: parse_yaml(value, f"--{setting}")}, kind)
            own += words
    missing = [option for option in command.options if option.is_required and option.name not in given]
    if missing and not given & set(HELP):
        raise ValueError(f"{name} needs {missing[0].name}: {missing[0].help}.")
    return own, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments and RESUME in getattr(COMMANDS.get(arguments[0]), "options", ()):
            # A run outlives the terminal that it was started from; what it starts inherits that.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not arguments or arguments[0] in ("-h", "--help"):
        _overview().print_help()
        return 0
    name, rest = arguments[0], list(arguments[1:])
    try:
        if name not in COMMANDS:
            raise ValueError(f"there is no command {shown(name)!r}; use one of {', '.join(COMMANDS)}.")
        return resolve_name(COMMANDS[name].function)(*parse(name, rest)) or 0
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2, rest)
    except (FloatingPointError, RuntimeError, OSError) as error:
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
