"""`self-forcing plan`: how much memory a rank of each role of a distillation takes."""

from typing import Any

from rich.table import Table

from orchestrator.config import RunConfig
from orchestrator.planner import GIB, alternatives, plan
from pipelines.console import console, say


def command(config: RunConfig, _: Any) -> None:
    ranks = plan(config)
    parts = list(dict.fromkeys(name for rank in ranks for name in rank.parts))
    table = Table(title="GiB of a rank, at its fullest")
    table.add_column("")
    for rank in ranks:
        table.add_column(rank.role, justify="right")
    table.add_row("ranks", *(str(rank.ranks) for rank in ranks))
    table.add_row("videos at once", *(str(rank.videos) for rank in ranks), end_section=True)
    for name in parts:
        table.add_row(
            name, *(f"{rank.parts[name] / GIB:.1f}" if name in rank.parts else "–" for rank in ranks)
        )
    table.add_section()
    table.add_row("in all", *(f"{rank.total / GIB:.1f}" for rank in ranks))
    console.print(table)
    say("By arithmetic; a process takes some GiB more. Add up the roles that share a device.")
    for sentence in alternatives(config):
        say(f"Not in this recipe: {sentence}")
