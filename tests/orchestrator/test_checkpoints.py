"""A checkpoint is written beside training, and holds what was learned when it began."""

from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from infra import storage
from infra.storage import StorageError
from orchestrator import checkpoints
from orchestrator.checkpoints import Checkpoints, load
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.run_state import RunState
from tests.fixtures import furnished
from tests.orchestrator.groups import Groups, weights_of

pytestmark = pytest.mark.slow


def spread_out(config: RunConfig, *, ranks: int, zero_stage: int) -> RunConfig:
    roles = config.distill.roles
    changed = {
        name: replace(role, ranks=ranks, engine=replace(role.engine, zero_stage=zero_stage))
        for name, role in (("student", roles.student), ("critic", roles.critic))
    }
    return replace(config, distill=replace(config.distill, roles=replace(roles, **changed)))


def test_training_goes_on_while_the_store_is_slow(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = furnished(tmp_path, overrides=["--distill.iterations=4", "--distill.student_every=1"])
    roles, store, begin = groups.roles(config), Event(), storage.begin

    def slow(path: str) -> str:
        assert store.wait(120)
        return begin(path)

    monkeypatch.setattr(checkpoints.storage, "begin", slow)
    state = RunState("distill", str(tmp_path), {}, keep=1)
    updates = Coordinator(config, roles.groups).run(0)
    next(updates)
    trained = {role: roles.groups[role] for role in ("student", "critic")}
    then = {role: weights_of(group) for role, group in trained.items()}
    with Checkpoints(state, roles.groups) as saved:
        saved.begin(1, 8)
        assert saved.look() == {} and saved.pending == 1
        assert [done for done, _ in updates] == [2, 3, 4]
        assert saved.look() == {} and not storage.is_complete(state.path(1))
        store.set()
        assert saved.end()["seconds/checkpoint_stored"] > 0 and saved.pending is None
    assert storage.read_metadata(state.path(1))["position"] == 8
    for role, group in trained.items():
        now = weights_of(group)
        assert any(not torch.equal(now[name], then[role][name]) for name in now)
    load(state.path(1), roles.groups)
    for role, group in trained.items():
        now = weights_of(group)
        assert all(torch.equal(now[name], then[role][name]) for name in now)

    # The same run, spread out otherwise.
    spread = groups.roles(spread_out(config, ranks=2, zero_stage=3))
    load(state.path(1), spread.groups)
    for role in trained:
        now = weights_of(spread.groups[role])
        assert all(torch.equal(now[name], then[role][name]) for name in now)
    assert [done for done, _ in Coordinator(spread.config, spread.groups).run(1)] == [2, 3, 4]


def test_what_cannot_be_written_is_told_at_the_next_look_and_another_may_begin(
    groups: Groups, tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    roles = groups.roles(config)
    (tmp_path / "file").write_text("no directory")
    broken = RunState("distill", f"{tmp_path}/file", {}, keep=1)
    with Checkpoints(broken, roles.groups) as saved:
        saved.begin(1, 0)
        with pytest.raises(StorageError, match="cannot be written"):
            saved.end()
        saved.state = RunState("distill", str(tmp_path), {}, keep=1)
        saved.begin(2, 0)
    assert storage.newest_complete(f"{tmp_path}/checkpoints") == saved.state.path(2)
