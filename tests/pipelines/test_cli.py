"""What a person types, and what is wrong with it: one sentence and exit code 2, before anything starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from orchestrator.config import RunConfig
from pipelines import cli
from pipelines.commands import COMMANDS
from pipelines.console import summary
from pipelines.recipe import settings
from tests.fixtures import TINY_RECIPE, write_model

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What a command says that is refused, which leaves nothing behind in the working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> str:
        assert cli.main([str(each) for each in arguments]) == 2
        assert list(here.iterdir()) == []
        said = capfd.readouterr().err
        assert said.startswith("self-forcing: ") and said.count("\n") == 1, said
        return said.removeprefix("self-forcing: ").strip()

    return run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"distill: {batch: 4}\ndistill: {keep: 1}\n", "distill is written twice (line 2)"),
        (b"distill: {keep: 1, batch: 4, keep: 2}\n", "keep is written twice (line 1)"),
        (b"distill:\n\tbatch: 4\n", "is not valid YAML: found character '\\t'"),
        (b"\x00\xff\xfe", "is not YAML, which is text"),
        (b"\x00", "is not YAML, which is text"),
        (
            b"root: !!python/object/apply:os.getcwd []\n",
            "is not valid YAML: could not determine a constructor",
        ),
        (b"- seed\n", "must hold settings by name, like `seed: 0`, and not a list"),
        (b"", "must hold settings by name, like `seed: 0`, and not null"),
        (b"base: [quickstart]\n", "base must be the path or the name of one recipe, not a list"),
        (b"base: quickstrat\n", "there is no recipe 'quickstrat' beside"),
        (b"seed: null\n", "seed cannot be null; give it a value or leave it out (in "),
        (b"distill: [1, 2]\n", "distill is a group of settings and cannot be a list (in "),
        (b"distill: {roles: {critic: 3}}\n", "distill.roles.critic is a group of settings and cannot be '3'"),
        (b"distill: {iteration: 3}\n", "there is no setting distill.iteration (in "),
        (b"distill: {iteration: 3}\n", "the nearest is distill.iterations."),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(
    refused: Refused, tmp_path: Path, text: bytes, says: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text)
    for command in ("distill", "prepare"):  # strict also where the section does not matter
        assert says in refused(command, recipe)


def test_a_base_lies_beside_its_recipe(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        "{seed: 7, rollout: {window: 5, sink: 1}, distill: {objective: {weights: {sid: 1}}}}"
    )
    (folder / "recipe.yaml").write_text("{base: base.yaml, rollout: {window: 6}}")
    config, _ = cli.parse("run", [str(folder / "recipe.yaml"), "--rollout.sink=2"])
    assert (config.seed, config.rollout.window, config.rollout.sink) == (7, 6, 2)
    assert config.distill.objective.weights == {"sid": 1}
    # What lies in the working directory has no say.
    (folder / "base.yaml").rename(tmp_path / "base.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no recipe 'base\.yaml' beside"):
        cli.parse("run", [str(folder / "recipe.yaml")])
    (tmp_path / "loop.yaml").write_text("base: loop.yaml")
    with pytest.raises(ValueError, match="is its own base"):
        cli.parse("run", ["loop.yaml"])


COUNTS = [
    *(f"pretrain.{name}" for name in ("updates", "batch", "checkpoint_every", "shift")),
    "pretrain.role.ranks", "pretrain.role.threads",
    *(f"initialize.{name}" for name in ("updates", "batch", "checkpoint_every")),
    *(f"initialize.{name}" for name in ("pairs", "ode_steps", "samplers")),
    *(f"distill.{name}" for name in ("iterations", "student_every", "batch", "checkpoint_every", "keep")),
    *(f"evaluate.{name}" for name in ("videos", "frames", "batch", "teacher_steps", "threads")),
    *(f"video.{name}" for name in ("frames", "channels", "height", "width", "fps", "pixel_std")),
    *(f"student.{name}" for name in ("dim", "ffn_dim", "num_heads", "num_layers")),
    *(f"student.{name}" for name in ("text_len", "text_dim", "freq_dim", "eps")),
    "rollout.chunk", "rollout.shift", "score.shift", "placement.timeout_s", "distill.discriminator.num_class",
    "distill.roles.critic.engine.accumulation", "distill.roles.critic.engine.eps",
    "pretrain.role.engine.schedule.updates",
]  # fmt: skip
SIZES = [
    "seed", "pretrain.dropout", "initialize.dropout", "initialize.role.engine.schedule.warmup",
    "distill.given_frames", "distill.sample_every", "pretrain.role.cpus", "distill.roles.teacher.gpus",
    "tracking.system_metrics_every_s",
    "distill.roles.student.engine.learning_rate", "distill.roles.student.engine.ema_start", "rollout.sink",
    "distill.discriminator.weight", "distill.objective.sid_alpha",
]  # fmt: skip


@pytest.mark.parametrize("setting", COUNTS)
def test_what_must_be_positive_cannot_be_0_or_less(refused: Refused, setting: str) -> None:
    for value in (0, -5):
        said = refused("run", TINY_RECIPE, f"--{setting}={value}")
        assert said.startswith(f"{setting} is {value}") and "must be" in said, said


@pytest.mark.parametrize("setting", SIZES)
def test_what_counts_from_0_cannot_be_negative(refused: Refused, setting: str) -> None:
    said = refused("run", TINY_RECIPE, f"--{setting}=-5")
    assert said.startswith(f"{setting} is -5") and "must" in said, said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("generate", "quickstart", "--video.fps", "4"), "there is no setting video.fps; the nearest is"),
        (("generate", "quickstart", "--model", "m", "--prompt", "p"), "unrecognized arguments: quickstart."),
        (("run", "quickstart", "--tracking.uri=s3://b/x"), "tracking.uri is 's3://b/x', which is no"),
        (("run", "quickstart", "--evaluate.suite=digit"), "evaluate.suite is 'digit'; use one of"),
        (("run", "quickstart", "--data.source=x"), "data.source is 'x'; use digits, or leave it out"),
        (("run", "x" * 5000), f"there is no recipe '{'x' * 80} …'; name a YAML file or one of digits,"),
        (("prepare", "quickstart", "--distill.keep", "3"), "prepare does not use distill.keep; leave it out"),
        (("pretrain", "quickstart", "--evaluate", "{videos: 3}"), "pretrain does not use evaluate;"),
        (
            ("distill", "quickstart", "--rollout={chunks: 3}"),
            "there is no setting rollout.chunks; the nearest is rollout.chunk.",
        ),
        (("distill", "quickstart", "--rollout=3"), "rollout is a group of settings and cannot be '3'."),
        (
            ("distill", "quickstart", "--distill.batch=many"),
            'Parser key "distill.batch": Expected a <class \'int\'>.',
        ),
        (("distill", "quickstart", "--distill.batch"), "argument --distill.batch: expected one argument."),
        (("distill", "quickstart", "--resum"), "there is no setting resum; the nearest is resume."),
        (("promote", "digits", "1", "--aliass", "x"), "there is no setting aliass; the nearest is alias."),
        (("register", "model"), "register needs --name: registered model"),
        (("serve", "--access.token", "x"), "there is no setting access.token; the nearest is access.tokens."),
        (("experiment",), "experiment needs name: experiment file"),
        (("experiment", "exposure-bias", "--distill.keep", "0"), "distill.keep is 0; it must be at least 1."),
        (("submit",), "submit needs a recipe to run"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_the_nearest(refused: Refused, words: tuple[str, ...], says: str) -> None:
    assert refused(*words).startswith(says)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_what_it_uses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--traceback" in said
    uses = COMMANDS[command].uses
    shown = {name for name in settings(RunConfig) if f"--{name} " in said or f"--{name}\n" in said}
    if uses is not None:
        assert shown == {name for name in settings(RunConfig) if name.split(".")[0] in uses}


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"    {command}" in said for command in COMMANDS)


def test_where_runs_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def uri(*more: str) -> str | None:
        return cli.parse("run", [str(TINY_RECIPE), f"--root={tmp_path}", *more])[0].located().tracking.uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert uri() == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert uri() == "http://mlflow:5000"
    assert uri("--tracking.uri=http://other:5000") == "http://other:5000"


@pytest.mark.parametrize(
    "words",
    [
        ("register", "STUDENT", "--name", "digits"),
        ("promote", "digits", "1"),
        ("promote", "digits", "--rollback"),
        ("serve", "--model", "models:/digits@serving"),
    ],
)
def test_the_registry_is_where_the_environment_says(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    student = str(tmp_path / "student")
    rollout = RolloutConfig(chunk=2, window=4, positions="relative", steps=(1000, 500))
    write_model(
        student, TransformerConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=1), seed=1, rollout=rollout
    )
    said = refused(*(word.replace("STUDENT", student) for word in words))
    assert "http://127.0.0.1:9" in said and "does not answer" in said


@pytest.mark.parametrize(
    "words",
    [
        ("LONG",),
        ("run", "LONG"),
        ("run", "quickstart", "--LONG=1"),
        ("run", "quickstart", "--distill.batch=LONG"),
        ("run", "quickstart", "--distill=LONG"),
        ("generate", "--model", "m", "--prompt", "p", "LONG"),
        ("generate", "--model", "m", "--prompt", "p", "--frames", "LONG"),
    ],
)
def test_what_is_long_is_not_repeated_whole(refused: Refused, words: tuple[str, ...]) -> None:
    for long in ("x" * 10_000, "a two " * 2000):
        assert len(refused(*(word.replace("LONG", long) for word in words))) < 800


def test_a_wrong_uri_in_the_environment_is_named_before_anything_starts(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "s3://b/x")
    assert refused("run", TINY_RECIPE).startswith("tracking.uri is 's3://b/x', which is no tracking URI;")


def test_a_proxy_is_not_asked_for_this_machine() -> None:
    script = "from pipelines import cli; from urllib.request import proxy_bypass as direct; "
    script += "print(*map(bool, map(direct, ['localhost', '127.0.0.1', 'store.example', 'example.org'])))"
    proxies = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "store.example"}
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, env=environment | proxies).split() == [b"True"] * 3 + [b"False"]


def test_brackets_in_a_path_mean_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    summary("Model", {"model": "/runs/[/red]/[bold]a:smile:"})
    assert "/runs/[/red]/[bold]a:smile:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_outlives_the_pipe_and_the_terminal_that_it_prints_to(tmp_path: Path) -> None:
    """The reader of its output is gone and the terminal hangs up, and what comes after is still done."""
    before = signal.getsignal(signal.SIGHUP)
    script = (
        "import os, signal, sys; from pipelines import cli, prepare; from pipelines.console import say\n"
        "def work(config):\n"
        "    say('begun'); os.kill(os.getpid(), signal.SIGHUP); say('on')\n"
        "    open(sys.argv[-1].partition('=')[2] + '/done', 'w')\n"
        "prepare.prepare = work\n"
        "sys.exit(cli.main())"
    )
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", script, "prepare", str(TINY_RECIPE), f"--root={tmp_path}"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "done").exists()
    assert signal.getsignal(signal.SIGHUP) == before  # of a command that is called and not started
