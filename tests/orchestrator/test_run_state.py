"""What makes a run this run: what may be other when it goes on, what may not, and what that is called."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.storage.local import host
from orchestrator import run_state
from orchestrator.config import RunConfig
from orchestrator.run_state import RunState, open_run
from orchestrator.update_plan import UpdatePlan
from pipelines import cli, tracked
from pipelines.ode_pairs import missing_pairs
from pipelines.tracked import is_done
from tests.fixtures import TINY_RECIPE, furnished, write_model, write_real

LEARNING_RATE = "distill.roles.critic.engine.learning_rate"
TRAINING: tuple[run_state.Stage, ...] = ("pretrain", "initialize", "distill")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_real(tmp_path / "videos", furnished(tmp_path))
    return tmp_path


def arguments(root: Path, *more: str) -> list[str]:
    return [str(TINY_RECIPE), f"--root={root}", *more]


def parsed(root: Path, *more: str) -> RunConfig:
    return cli.parse("run", arguments(root, *more))[0].located()


def data_of(stage: str) -> list[str]:
    return ["--data.train=videos"] if stage == "pretrain" else []


def checkpointed(state: RunState, *, done: int, position: int) -> None:
    """The checkpoint of a stage, with content of no meaning."""
    staging = storage.begin(state.path(done))
    (Path(staging) / "part.pt").write_bytes(bytes(range(200)))
    state.publish(staging, done, position)


@pytest.fixture
def refusal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Run a command that must be refused before Ray starts; its one sentence."""

    def connect(address: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(tracked, "connect", connect)

    def refused(command: str, *given: str) -> str:
        capfd.readouterr()
        assert cli.main([command, *given]) == 2
        said = capfd.readouterr().err
        assert said.startswith("self-forcing: ") and said.count("\n") == 1, said
        return said.removeprefix("self-forcing: ").strip()

    yield refused


def test_the_newest_checkpoints_stay_and_those_of_a_cadence(root: Path) -> None:
    config = parsed(root, "--distill.keep=2", "--distill.keep_every=4")
    state = open_run(config, "distill", resume=False)
    for done in range(2, 16, 2):
        checkpointed(state, done=done, position=0)
    kept = sorted(int(path.name) for path in (root / "outputs/distilled/checkpoints").iterdir())
    assert kept == [4, 8, 12, 14]


@pytest.mark.parametrize("stage", TRAINING)
def test_what_decides_no_number_never_refuses(root: Path, stage: run_state.Stage) -> None:
    state = open_run(parsed(root, *data_of(stage)), stage, resume=False)
    checkpointed(state, done=1, position=8)
    more = {
        "pretrain": ["pretrain.role.cpus=4", "pretrain.role.activation_checkpointing=true"],
        "initialize": ["initialize.role.cpus=4", "initialize.samplers=3", "initialize.pairs_path=elsewhere"],
        "distill": [
            *("distill.keep=9", "distill.sample_every=0", "distill.overlap=false", "distill.iterations=60"),
            *("distill.roles.teacher.cpus=2", "placement.mode=disaggregated"),
            *("distill.selection.every=5", "distill.selection.patience=1", "distill.selection.export=best"),
        ],
    }[stage]
    more += [f"{stage}.checkpoint_every=77", "video.fps=30", "tracking.experiment=x"]
    moved = shutil.move(root, root.with_name(f"{root.name}-moved"))
    config = parsed(Path(moved), *data_of(stage), *(f"--{each}" for each in more))
    found = open_run(config, stage, resume=True)
    assert (found.done, found.position, found.stretches) == (1, 8, ())


@pytest.mark.parametrize(
    ("stage", "changed", "told"),
    [
        ("pretrain", "pretrain.batch=8", "pretrain.batch 4 → 8"),
        ("pretrain", "pretrain.role.engine.learning_rate=1", "pretrain.role.engine.learning_rate 0.001 → 1"),
        ("pretrain", "seed=4", "seed 3 → 4"),
        ("pretrain", "pretrain.updates=9", "pretrain.updates 4 → 9"),
        ("initialize", "initialize.batch=8", "initialize.batch 4 → 8"),
        ("initialize", "initialize.method=teacher_forcing", "initialize.method 'ode' → 'teacher_forcing'"),
        ("distill", "distill.batch=8", "distill.batch 4 → 8"),
        ("distill", f"{LEARNING_RATE}=0.5", f"{LEARNING_RATE} 0.0002 → 0.5"),
        (
            "distill",
            "distill.roles.critic.engine.schedule.warmup=4",
            "distill.roles.critic.engine.schedule.warmup 0 → 4",
        ),
        ("distill", "score.shift=4", "score.shift 3 → 4"),
        (
            "distill",
            "distill.roles.teacher.negative_prompt=a",
            "distill.roles.teacher.negative_prompt '' → 'a'",
        ),
        ("distill", "seed=4", "seed 3 → 4"),
    ],
)  # fmt: skip
def test_another_setting_is_refused_by_name(
    root: Path, refusal: Callable[..., str], stage: run_state.Stage, changed: str, told: str
) -> None:
    given = arguments(root, *data_of(stage), "--data.real=videos")
    state = open_run(parsed(root, *given[2:]), stage, resume=False)
    checkpointed(state, done=2, position=8)
    assert "already holds checkpoints; continue with --resume" in refusal(stage, *given)
    says = refusal(stage, *given, f"--{changed}", "--resume")
    name = changed.partition("=")[0]
    assert says.startswith(state.path(2)) and told in says, says
    assert f"choose another {stage}.output." in says
    # A seed and a method are the run itself; the rest may be changed on purpose.
    fixed = name in ("seed", "initialize.method")
    assert (f"--allow-change {name}" in says) != fixed
    if fixed:
        assert told in refusal(stage, *given, f"--{changed}", "--resume", "--allow-change", name)


def test_a_setting_that_has_another_name_now_is_known_by_it(root: Path) -> None:
    config = parsed(root, *data_of("pretrain"))
    new = run_state.identity(config, "pretrain")
    before = {name: value for name, value in new.items() if ".schedule." not in name}
    assert not run_state.differences({**before, "pretrain.warmup": 1}, new)
    told = run_state.differences({**before, "pretrain.warmup": 7}, new)
    assert list(told.values()) == ["pretrain.role.engine.schedule.warmup 7 → 1"]


def other_data(config: RunConfig) -> None:
    """The same data set without its last row, in the same place."""
    (shard,) = Path(config.data.train).glob("*.parquet")
    pq.write_table(pq.read_table(shard)[:-1], shard)


def other_model(path: str, config: RunConfig, student: bool) -> None:
    rollout = config.rollout if student else None
    write_model(path, config.student, seed=77, rollout=rollout, video=config.video)


CHANGES: dict[str, Callable[[RunConfig], Any]] = {
    "data.train": other_data,
    "distill.teacher": lambda config: other_model(config.distill.teacher, config, False),
    "distill.student": lambda config: other_model(config.distill.student, config, True),
    "initialize.teacher": lambda config: other_model(config.initialize.teacher, config, False),
}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("pretrain", "data.train"),
        ("initialize", "data.train"),
        ("initialize", "initialize.teacher"),
        *(("distill", name) for name in ("data.train", "distill.teacher", "distill.student")),
    ],
)
def test_another_input_at_the_same_place_is_refused(
    root: Path, refusal: Callable[..., str], stage: run_state.Stage, name: str
) -> None:
    given = arguments(root, *data_of(stage))
    config = parsed(root, *data_of(stage))
    state = open_run(config, stage, resume=False)
    checkpointed(state, done=2, position=8)
    assert open_run(config, stage, resume=True).done == 2
    CHANGES[name](config)
    says = refusal(stage, *given, "--resume")
    assert re.search(rf"another {name} \([0-9a-f]{{8}} → [0-9a-f]{{8}}\)", says), says


@pytest.mark.parametrize("change", ["data.train", "initialize.teacher", "negative_prompt"])
def test_pairs_of_another_teacher_or_of_other_prompts_are_not_taken(
    root: Path, refusal: Callable[..., str], change: str
) -> None:
    config = parsed(root)
    assert missing_pairs(config)
    staging = storage.begin(config.initialize.pairs_path)
    storage.publish(staging, config.initialize.pairs_path, {"identity": run_state.identity(config, "pairs")})
    more = []
    if change == "negative_prompt":
        more = [f"--distill.roles.teacher.{change}=a one"]
    else:
        # What only training asks for is no reason to make pairs anew.
        assert not missing_pairs(
            parsed(root, "--initialize.batch=8", "--rollout.chunk=3", "--initialize.updates=9")
        )
        CHANGES[change](config)
    says = refusal("initialize", *arguments(root, *more))
    assert says.startswith(f"{config.initialize.pairs_path} holds ODE pairs that were made otherwise: ")
    assert change in says and "delete it, or choose another initialize.pairs_path." in says


@pytest.mark.parametrize("stage", TRAINING)
def test_fewer_updates_than_are_done_are_refused(
    root: Path, refusal: Callable[..., str], stage: run_state.Stage
) -> None:
    config = parsed(root, *data_of(stage))
    state = open_run(config, stage, resume=False)
    checkpointed(state, done=4, position=16)
    total = f"{stage}.{'iterations' if stage == 'distill' else 'updates'}"
    says = refusal(
        stage, *arguments(root, *data_of(stage), f"--{total}=3", "--resume", f"--allow-change={total}")
    )
    assert says == (
        f"{state.path(4)} has 4 updates behind it, and {total} says 3; "
        f"ask for 4 or more, or choose another {stage}.output."
    )


def test_allowed_changes_become_stretches_and_the_data_goes_on_where_it_stood(root: Path) -> None:
    config = parsed(root)
    state = open_run(config, "distill", resume=False)
    plan = UpdatePlan(config)
    checkpointed(state, done=4, position=plan.position(4, "student", 0))
    other = parsed(root, "--distill.batch=8", f"--{LEARNING_RATE}=0.1")
    again = open_run(other, "distill", resume=True, allow=["distill.batch", LEARNING_RATE, "pretrain.batch"])
    assert list(again.stretches) == [
        {"from": 4, "setting": "distill.batch", "old": 4, "new": 8},
        {"from": 4, "setting": LEARNING_RATE, "old": 0.0002, "new": 0.1},
    ]
    assert f"from update 4 on {LEARNING_RATE} 0.0002 → 0.1." in again.notes
    # Six batches of 4 in four iterations: two of the student's and four of the critic's.
    later = UpdatePlan(other, again.done, again.position)
    assert [later.position(4, "critic", 0), later.position(5, "critic", 0)] == [24, 32]
    assert later.position(6, "critic", 0) == 24 + 3 * 8
    checkpointed(again, done=6, position=later.position(6, "student", 0))

    # Without a change a resumed run's positions are those of one that was never stopped.
    resumed = UpdatePlan(config, 4, 24)
    for iteration in range(4, 12):
        assert resumed.position(iteration, "critic", 0) == plan.position(iteration, "critic", 0)

    # From now on the new values are the run's own, and what was changed before is still known.
    third = open_run(other, "distill", resume=True)
    assert (third.done, third.position, third.stretches) == (6, 40, again.stretches)
    with pytest.raises(ValueError, match=r"distill.batch 8 → 4, .*learning_rate 0.1 → 0.0002;"):
        open_run(config, "distill", resume=True)


def test_what_a_checkpoint_has_the_shape_of_cannot_change(root: Path, refusal: Callable[..., str]) -> None:
    checkpointed(open_run(parsed(root), "distill", resume=False), done=2, position=12)
    for name, value, told in (
        ("seed", "4", "3 → 4"),
        ("distill.roles.critic.engine.ema_decay", "0.9", "none → 0.9"),
    ):
        says = refusal("distill", *arguments(root, f"--{name}={value}", "--resume", f"--allow-change={name}"))
        assert f"cannot go on with {name} {told}; keep what it was made with, or choose another" in says
    says = refusal("distill", *arguments(root, "--resume", "--allow-change", "distill.batsh"))
    assert says == "there is no setting distill.batsh (in --allow-change); the nearest is distill.batch."


def test_how_a_run_is_spread_out_may_change_and_is_recorded(root: Path) -> None:
    checkpointed(open_run(parsed(root), "distill", resume=False), done=2, position=12)
    spread = parsed(
        root,
        "--distill.roles.student.ranks=2",
        "--distill.roles.critic.engine.zero_stage=3",
        "--distill.roles.critic.engine.accumulation=2",
    )
    state = open_run(spread, "distill", resume=True)
    assert state.done == 2 and {each["setting"] for each in state.stretches} == {
        "distill.roles.student.ranks",
        "distill.roles.critic.engine.zero_stage",
        "distill.roles.critic.engine.accumulation",
    }
    assert "from update 2 on distill.roles.student.ranks 1 → 2." in state.notes


def test_a_setting_that_an_earlier_release_did_not_have_was_at_its_default(root: Path) -> None:
    config = parsed(root)
    found = run_state.identity(config, "distill")
    older = {name: value for name, value in found.items() if name != "distill.given_frames"}
    assert run_state.differences(older, found) == {}
    other = run_state.differences(older, found | {"distill.given_frames": 2})
    assert other == {"distill.given_frames": "distill.given_frames 0 → 2"}


def test_damaged_checkpoints_are_passed_over_with_a_sentence(root: Path) -> None:
    config = parsed(root)
    state = open_run(config, "distill", resume=False)
    state = replace(state, keep=9)
    for done in (2, 4, 5, 6):
        checkpointed(state, done=done, position=0)
    part = Path(state.path(6)) / "part.pt"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    (Path(state.path(5)) / "part.pt").unlink()
    (Path(state.path(4)) / "manifest.json").unlink()
    found = open_run(config, "distill", resume=True)
    assert (found.done, found.checkpoint) == (2, state.path(2))
    assert found.notes == (
        f"{state.path(4)} was never finished: it has no manifest.json; that checkpoint is passed over.",
        f"{state.path(6)} is damaged: the content of part.pt is not what was written; "
        "that checkpoint is passed over.",
        f"{state.path(5)} is damaged: part.pt is missing; that checkpoint is passed over.",
        f"resuming from update 2 ({state.path(2)}).",
    )


def test_what_killed_processes_left_is_removed_when_a_run_starts_again(root: Path) -> None:
    config = parsed(root)
    left = []
    for place in ("", "checkpoints", "samples"):
        aside = Path(config.distill.output, place, f".x.tmp-{host()}-999999999-1-{'0' * 16}")
        aside.mkdir(parents=True)
        left.append(aside)
    open_run(config, "distill", resume=True)
    assert [aside for aside in left if aside.exists()] == []


def test_a_finished_stage_is_one_of_this_recipe_or_from_elsewhere(root: Path) -> None:
    config = parsed(root)
    model = f"{config.distill.output}/model"
    assert not is_done(config, "distill", model)
    write_model(model, config.student, seed=9, rollout=config.rollout, recipe=config.portable())
    assert is_done(config, "distill", model)  # made elsewhere: nothing says what by
    checkpointed(open_run(config, "distill", resume=False), done=6, position=32)
    assert is_done(config, "distill", model)
    assert not is_done(parsed(root, "--distill.iterations=8"), "distill", model)
    with pytest.raises(ValueError, match=r"has 6 updates behind it, and distill\.iterations says 2"):
        is_done(parsed(root, "--distill.iterations=2"), "distill", model)
    with pytest.raises(ValueError, match=r"was made otherwise: distill\.batch 4 → 8"):
        is_done(parsed(root, "--distill.batch=8"), "distill", model)


def test_a_stop_says_what_works(root: Path) -> None:
    state = replace(open_run(parsed(root), "distill", resume=False), keep=9)
    for done in (2, 4):
        checkpointed(state, done=done, position=0)
    rates = [LEARNING_RATE, "distill.roles.student.engine.learning_rate"]
    start = str(state.stop("critic loss is nan", since=0, until=0, rates=rates))
    assert start.endswith("nothing was learned yet, so look at the models and the data that it starts from.")
    # The critic of checkpoint 4 gives no number whatever it learns by next; that of 2 may go another way.
    says = str(state.stop("critic loss is nan", since=4, until=4, rates=rates))
    assert says.startswith(
        f"critic loss is nan; go on with a lower {' or '.join(rates)}, as in --{LEARNING_RATE} VALUE "
    )
    assert f"--allow-change {LEARNING_RATE} --resume ({state.path(4)} led there and is kept in " in says
    assert storage.is_complete(f"{state.output}/not-finite/0000004")
    assert storage.newest_complete(f"{state.output}/checkpoints") == state.path(2)
    assert "led there" not in str(state.stop("critic loss is nan", since=4, until=3, rates=rates))
