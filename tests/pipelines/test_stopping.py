"""A run that is asked to end makes a checkpoint first; asked twice, it ends at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import storage
from pipelines import cli
from pipelines.stopping import stoppable
from tests.fixtures import TINY_RECIPE, furnished

ROOT = Path(__file__).parents[2]


def started(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "pipelines.cli", *words],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(run: "subprocess.Popen[str]", word: str) -> None:
    """Reads what it says up to a line with the word."""
    seen = ""
    for line in run.stdout or ():
        seen += line
        if word in line:
            return
    pytest.fail(f"it never said {word!r}:\n{seen}")


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_for_the_end_and_a_second_one_ends(
    by: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(by)
    with stoppable("distill") as stopping:
        assert not stopping
        os.kill(os.getpid(), by)
        assert stopping
        ended = stopping.stop(4)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as at_once:
            os.kill(os.getpid(), by)
        if by == signal.SIGTERM:
            assert at_once.value.code == code  # type: ignore[union-attr]
    assert (ended.code, ended.done) == (code, 4) and signal.getsignal(by) is before
    said = capsys.readouterr().out
    assert "distill: stopped by" in said and "after 4 updates, with a checkpoint; --resume goes on" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "by", "code"),
    [
        # The handler of both is one; how a job stops is tested in test_submit.
        pytest.param("distill", signal.SIGINT, 130, marks=pytest.mark.by_hand),
        pytest.param("distill", signal.SIGTERM, 143, marks=pytest.mark.by_hand),
        # How the ranks stop is tested in test_single_model.
        pytest.param("pretrain", signal.SIGTERM, 143, marks=pytest.mark.by_hand),
    ],
)
def test_it_ends_with_a_checkpoint(
    reused_actors: None, reused_rank: None, stage: str, by: signal.Signals, code: int, tmp_path: Path
) -> None:
    if stage == "distill":
        furnished(tmp_path)
    total = "iterations" if stage == "distill" else "updates"
    words = [stage, str(TINY_RECIPE), f"--root={tmp_path}", f"--{stage}.checkpoint_every=100000"]
    if stage == "pretrain":
        assert cli.main(["prepare", str(TINY_RECIPE), f"--root={tmp_path}"]) == 0
    run = started(*words, f"--{stage}.{total}=100000")
    until(run, "min left")
    run.send_signal(by)
    rest = run.communicate(timeout=120)[0]
    assert run.returncode == code, rest
    output = tmp_path / "outputs" / ("distilled" if stage == "distill" else "teacher")
    found = storage.newest_complete(output / "checkpoints")
    assert found is not None
    done = storage.read_metadata(found)["done"]
    assert f"after {done} updates, with a checkpoint" in " ".join(rest.split())
    assert not (output / "model").exists() and not (output / "lock.json").exists()

    allowed = ["--allow-change", "pretrain.updates"] if stage == "pretrain" else []
    assert cli.main([*words, f"--{stage}.{total}={done + 1}", "--resume", *allowed]) == 0
    assert storage.is_complete(output / "model")
