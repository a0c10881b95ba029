"""No path that is not a path: every setting and option that takes a place, given places of every kind."""

import os
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Invalid, Places
from orchestrator.config import RunConfig
from orchestrator.serving.config import ServeConfig
from pipelines import cli
from pipelines.commands import COMMANDS
from pipelines.recipe import fields_of, find, is_part
from tests.fixtures import TINY_RECIPE

LOCAL = {
    "root", "video.vae", "text.path", "light_decoder", "access.tokens",
    "--root", "--encoder", "--certificate", "--key", "--light-decoder", "--adapter", "source",
}  # fmt: skip
"""What is of a file system alone: folders of encoders, files that a process reads before storage is known."""
WORDS = "a b é 視頻"


def places_of(kind: Any, prefix: str = "") -> dict[str, bool]:
    """Every setting of a config that takes a place, by dotted name, and whether it lies below `root`."""
    found = {}
    if issubclass(kind, Places):
        found = {prefix + name: name in kind.OUTPUTS for name in (*kind.OUTPUTS, *kind.INPUTS)}
    for name, hint in fields_of(kind).items():
        if is_part(hint):
            found |= places_of(hint, f"{prefix}{name}.")
    return found


SETTINGS = places_of(RunConfig)
SERVE = ("model", "light_decoder", "access.tokens", "videos.storage")
OPTIONS = [
    (command, option.name)
    for command, entry in COMMANDS.items()
    for option in entry.options
    if option.path
]  # fmt: skip
BESIDE = ("--video.codec=wan_vae", "--text.encoder=umt5")
"""What the settings need beside them, so that only the places are looked at."""


def kinds(home: Path) -> dict[str, str]:
    """Place as a person writes it → path that it means, for those of a file system."""
    here = Path.cwd()
    return {
        f"{home}/x/{WORDS}": f"{home}/x/{WORDS}",
        f"sub/{WORDS}": f"{here}/sub/{WORDS}",
        f"~/x/{WORDS}": f"{home}/x/{WORDS}",
        f"file://{home}/x/a%20b%20é": f"{home}/x/a b é",
        f"file://localhost{home}/x": f"{home}/x",
    }


def value_of(config: Any, name: str) -> str:
    for word in name.split("."):
        config = getattr(config, word)
    return str(config)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def configured(places: dict[str, str]) -> RunConfig:
    fill = {"video.vae": "v", "text.path": "t", "distill.roles.teacher.negative_embedding": "n"} | places
    words = [str(TINY_RECIPE), *BESIDE, *(f"--{name}={place}" for name, place in fill.items())]
    config, _ = cli.parse("run", words)
    return config


def test_the_walk_finds_every_setting_that_takes_a_place() -> None:
    assert {"data.train", "initialize.pairs_path", "evaluate.output", "distill.critic"} <= SETTINGS.keys()
    words = ("output", "path", "storage", "tokens", "train", "held_out", "real", "critic", "features", "vae")
    named = [
        name
        for kind in (RunConfig, ServeConfig)
        for name in cli.settings(kind)
        if name.rpartition(".")[2] in words and find(kind, name) in (str, str | None)
    ]
    assert not set(named) - SETTINGS.keys() - set(SERVE)


def test_settings_take_every_kind_of_place(home: Path) -> None:
    for written, meant in kinds(home).items():
        config = configured(dict.fromkeys(SETTINGS, written)).located()
        assert {name: value_of(config, name) for name in SETTINGS} == dict.fromkeys(SETTINGS, meant)
        assert configured({"root": written}).located().root == meant
    stored = {name: f"s3://bucket/{name}/{WORDS}" for name in SETTINGS if name not in LOCAL}
    config = configured(stored).located()
    assert {name: value_of(config, name) for name in stored} == stored


@pytest.mark.parametrize("name", ["root", *SETTINGS])
def test_a_place_of_another_kind_is_one_sentence(name: str) -> None:
    for other in ("gs://bucket/x", "s3:/bucket/x", "models:/x/1"):
        with pytest.raises(Invalid, match=f"^{name} is {other}; use a path"):
            configured({name: other})
    if name in LOCAL:
        with pytest.raises(Invalid, match=f"^{name} is s3://.*; use a path of a local or shared file system"):
            configured({name: "s3://bucket/x"})


def test_a_file_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(Invalid, match=r"^distill\.output is file://there/x, a file of another machine"):
        configured({"distill.output": "file://there/x"})


@pytest.mark.parametrize("name", SERVE)
def test_a_setting_of_serve_takes_every_kind_of_place(name: str, home: Path) -> None:
    def configured(place: str) -> str:
        return os.path.abspath(value_of(cli.parse("serve", [f"--{name}={place}"])[0], name))

    for written, meant in kinds(home).items():
        assert configured(written) == meant
    for other in ("gs://bucket/x", "s3:/bucket/x"):
        with pytest.raises(ValueError, match=f"^{name} is {other}; use a path"):
            configured(other)
    if name in LOCAL:
        with pytest.raises(ValueError, match=f"^{name} is s3://bucket/x; use a path of a local"):
            configured("s3://bucket/x")
    else:
        assert cli.parse("serve", [f"--{name}=s3://bucket/{WORDS}"])


@pytest.mark.parametrize(("command", "name"), OPTIONS)
def test_an_option_takes_every_kind_of_place(command: str, name: str, home: Path) -> None:
    entry = COMMANDS[command]
    config = [str(TINY_RECIPE)] if entry.recipe else []
    key = name.lstrip("-").replace("-", "_")

    def given(place: str) -> str:
        words = list(config)
        for option in entry.options:
            if option.name == name:
                words += [place] if not name.startswith("-") else [f"{name}={place}"]
            elif option.is_required:
                words += ["x"] if not option.name.startswith("-") else [f"{option.name}=x"]
        return str(cli.parse(command, words)[1][key])

    for written, meant in list(kinds(home).items())[1 if entry.recipe else 0 : 3]:
        assert os.path.abspath(given(written)) == meant
    if name in LOCAL:
        with pytest.raises(Invalid, match=f"^{name} is s3://bucket/x; use a path of a local"):
            given("s3://bucket/x")
    else:
        assert given(f"s3://bucket/{WORDS}") == f"s3://bucket/{WORDS}"
    for other in ("gs://bucket/x", "s3:/bucket/x"):
        with pytest.raises(Invalid, match=f"^{name} is {other}; use a path"):
            given(other)
