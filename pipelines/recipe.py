"""Recipes: YAML files of settings, each perhaps on top of another one, its `base`.

A recipe is read strictly. What a person may get wrong in one (a tab, a key written twice, a section that is
no section, a setting that there is not) is one sentence that names the file and the setting.
"""

import difflib
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent / "recipes"
EXPERIMENTS = Path(__file__).parent / "experiments"
PRESETS = Path(__file__).parent / "presets"


def shipped(name: str, folder: Path = RECIPES) -> Path:
    """A recipe or experiment by path, or by the name of one that ships; ValueError for neither."""
    for path in (Path(name), folder / f"{name}.yaml"):
        if os.path.isfile(path):  # where Path.is_file raises, as for a name that is too long, this does not
            return path
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ValueError(f"there is no {folder.name[:-1]} {_shown(name)}; name a YAML file or one of {names}.")


class _Strict(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} is written twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; ValueError, naming the line, where it is none. `source` is its place."""
    try:
        return yaml.load(text, _Strict)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise ValueError(f"{source} is not valid YAML: {error.problem}{line}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{source} is not YAML, which is text.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; ValueError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not YAML, which is text.") from None
    body = parse_yaml(text, str(path))
    if not isinstance(body, dict):
        raise ValueError(f"{path} must hold settings by name, like `seed: 0`, and not {_shown(body)}.")
    return body


def recipe_arguments(path: Path, kind: type, folder: Path = RECIPES) -> list[str]:
    """Options that read a recipe for configs of type `kind`, after the one that it names as its `base`."""
    bodies = recipe_bodies(path, kind, folder=folder)
    return [argument for body in bodies for argument in ("--config", yaml.safe_dump(body))]


def recipe_bodies(
    path: Path, kind: type, above: tuple[Path, ...] = (), folder: Path = RECIPES
) -> list[dict[str, Any]]:
    """The settings of a recipe, after those of the one that it names as its `base`; `above` are those that it
    is the base of, `folder` holds those that ship."""
    if path.resolve() in above:
        raise ValueError(f"the recipe {path} is its own base.")
    body = read_yaml(path)
    base = body.pop("base", None)
    check_names(body, kind, source=f" (in {path})")
    own = [body] if body else []
    if base is None:
        return own
    if not isinstance(base, str):
        raise ValueError(f"base must be the path or the name of one recipe, not {_shown(base)} (in {path}).")
    return [*recipe_bodies(beside(base, path, folder), kind, (*above, path.resolve()), folder), *own]


def beside(name: str, path: Path, folder: Path = RECIPES) -> Path:
    """The recipe that the file `path` names: beside it, or one that ships in `folder`; what lies in the
    working directory is no part of it."""
    for found in (path.parent / name, folder / f"{name}.yaml"):
        if os.path.isfile(found):
            return found
    raise ValueError(
        f"there is no {folder.name[:-1]} {_shown(name)} beside {path}, which names it, nor does one of "
        "that name ship."
    )


def check_names(body: Mapping[Any, Any], kind: type, *, source: str = "", prefix: str = "") -> None:
    """ValueError where `body` holds what is no setting of configs of type `kind`; `source` is its place."""
    for name, value in body.items():
        dotted = f"{prefix}{name}"
        hint = find(kind, dotted)
        if hint is None:
            raise unknown(dotted, settings(kind), source)
        if is_part(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{dotted} is a group of settings and cannot be {_shown(value)}{source}.")
            check_names(value, kind, source=source, prefix=f"{dotted}.")
        elif value is None and type(None) not in typing.get_args(hint):
            raise ValueError(f"{dotted} cannot be null; give it a value or leave it out{source}.")


def find(kind: type, dotted: str) -> Any:
    """Type of the setting, or of the group of settings, with this dotted name; None where there is none."""
    hint: Any = kind
    for name in dotted.split("."):
        if not is_part(hint):
            return Any if typing.get_origin(hint) is dict else None
        hint = fields_of(hint).get(name)
        if hint is None:
            return None
    return hint


def unknown(name: str, known: Iterable[str], source: str = "") -> ValueError:
    """The error for a setting or option that there is not."""
    close = difflib.get_close_matches(shown(name), list(known), n=1, cutoff=0.0)
    return ValueError(f"there is no setting {shown(name)}{source}; the nearest is {close[0]}.")


def shown(text: str, most: int = 80) -> str:
    """What a person gave, as far as an error repeats it."""
    return text if len(text) <= most else f"{text[:most]} …"


def _shown(value: Any) -> str:
    names = {list: "a list", dict: "a mapping", type(None): "null"}
    return names.get(type(value)) or repr(shown(str(value)))


def is_part(hint: Any) -> bool:
    """Whether a field of this type is a group of settings."""
    return isinstance(hint, type) and is_dataclass(hint)


@cache
def fields_of(kind: Any) -> Mapping[str, Any]:
    """Type of every field of a config, by name."""
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def settings(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a config type."""
    names = []
    for name, hint in fields_of(kind).items():
        names += settings(hint, f"{prefix}{name}.") if is_part(hint) else [prefix + name]
    return names
