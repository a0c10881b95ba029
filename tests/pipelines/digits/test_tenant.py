"""Digits are an example that nothing depends on, and their data is prepared where a recipe names them as its
source."""

from pathlib import Path

import pytest

import pipelines
from pipelines import cli
from pipelines.tenants import TENANTS
from tests.fixtures import TINY_RECIPE
from workers.dataset import ParquetDataset


def test_nothing_but_the_registry_names_digits() -> None:
    root = Path(pipelines.__file__).parent.parent
    folders = ("infra", "model", "workers", "orchestrator", "pipelines")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    names = ("pipelines.digits", "moving-digit", "moving_digit", '"digits', "`digits")
    named = {
        str(file.relative_to(root)): [name for name in names if name in file.read_text()] for file in files
    }
    outside = {file: found for file, found in named.items() if found and "pipelines/digits/" not in file}
    assert outside == {"pipelines/tenants.py": ["pipelines.digits"]}
    assert TENANTS == ("pipelines.digits",)


def test_prepare_writes_what_the_source_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"videos": 8, "held_out_frames": 7}
    more = [f"--data.source_settings.{name}={value}" for name, value in settings.items()]
    assert cli.main(["prepare", str(TINY_RECIPE), f"--root={tmp_path}", *more]) == 0
    train, held_out = (
        ParquetDataset(tmp_path / "outputs/data" / name, ["video"]) for name in ("train", "held_out")
    )
    # 40 held-out videos come from the recipe, and stay.
    assert (len(train), len(held_out)) == (8, 40)
    assert (train.row(0)["video"].shape[0], held_out.row(0)["video"].shape[0]) == (6, 7)
    assert "prepare: 8 training videos in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--data.source=none"],
            "data.source is 'none'; use digits, or leave it out where data is there.",
        ),
        (
            ["--data.source_settings.video=3"],
            "there is no setting data.source_settings.video; the nearest is data.source_settings.videos.",
        ),
        (
            ["--data.source_settings.held_out_videos=0"],
            "data.source_settings.held_out_videos is 0; it must be at least 1.",
        ),
        (["--data.source=null"], "data.source names nothing that makes data"),
    ],
)
def test_a_source_that_cannot_be(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", str(TINY_RECIPE), f"--root={tmp_path}", *more]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
