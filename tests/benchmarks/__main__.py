"""How fast everything is: `python -m tests.benchmarks` makes docs/results/speed.md; `--fast` prints what CI
does, in a minute.

On a GPU, `tests/benchmarks/gpu.sh` runs all there is for a card.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from infra.provenance import versions
from tests.benchmarks import roles, speed
from tests.benchmarks.report import BEGIN, END
from tests.benchmarks.speed import CUDA, SMALL, Figure

PARTS = ("rollout", "update", "cycle", "memory", "roles", "start")
HEAD = ("size", "what", "it takes", "of", "median", "least to most")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    out: str | None = "docs/results/speed"
    """Results are written here, with .jsonl and .md at the end, those there of other parts being kept; null
    writes none."""
    parts: tuple[str, ...] = ("rollout", "update", "memory", "roles", "start")
    """What is measured."""
    sizes: tuple[str, ...] = ("quickstart", "30M", "wan-block")
    """Of the models; `tiny`, `quickstart`, `30M`, `wan-block`, `wan-1.3b`."""
    rounds: int = 3
    """Turns of each comparison; three times as many where models are small."""
    compiled: bool = True
    """Also measure what is compiled, and bf16."""


FAST = Settings(out=None, parts=("rollout", "update"), sizes=("tiny", "quickstart"), rounds=1, compiled=False)


def measured(settings: Settings) -> Iterator[Figure]:
    parts: dict[str, Callable[[str, int], Iterator[Figure]]] = {
        "rollout": lambda size, rounds: speed.rollouts(size, rounds, compiled=settings.compiled),
        "update": speed.updates,
        "memory": speed.memory,
        "roles": roles.overlap,
        "start": roles.start,
    }
    for part in settings.parts:
        for size in settings.sizes:
            yield from parts[part](size, settings.rounds * (3 if size in SMALL else 1))


def kept(path: Path, anew: set[str]) -> Iterator[Figure]:
    """Figures that were measured before, of parts that were not measured `anew`."""
    for line in path.read_text().splitlines() if path.exists() else ():
        figure = Figure(**json.loads(line))
        if figure.part not in anew:
            yield figure


def rows(figures: list[Figure]) -> Iterator[tuple[str, list[str]]]:
    for each in figures:
        one = each.what == each.against
        spread = "–" if one else f"{each.low:.3g} to {each.high:.3g}"
        yield (
            each.part,
            [
                each.size, each.what, f"{each.value:.4g} {each.unit}", "–" if one else each.against,
                "–" if one else f"{each.ratio:.3g}", spread,
            ],
        )  # fmt: skip


def show(figures: list[Figure]) -> None:
    wide = Console(width=150)
    for part in dict.fromkeys(each.part for each in figures):
        table = Table(*HEAD, title=part, title_justify="left")
        for name, row in rows(figures):
            if name == part:
                table.add_row(*row)
        wide.print(table)


def machine() -> str:
    if CUDA:
        return f"one {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores ({processor()}), one thread"


def processor() -> str:
    """What /proc/cpuinfo calls it, and whether it multiplies bf16."""
    file = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in (file.read_text() if file.exists() else "").splitlines()]
    told = {name.strip(): value.split() for name, _, value in lines}
    named = " ".join(told.get("model name", [platform.machine()]))
    low = not {"avx512_bf16", "amx_bf16"}.isdisjoint(told.get("flags", []))
    return f"{named}, {'with' if low else 'without'} bf16 arithmetic"


def page(figures: list[Figure], path: Path) -> None:
    """Tables, with the findings that people wrote left as they are."""
    old = path.read_text() if path.exists() else f"{BEGIN}\n{END}"
    findings = old[old.index(BEGIN) : old.index(END) + len(END)]
    lines = [
        "# Speed",
        "",
        f"`python -m tests.benchmarks` on {machine()}; "
        + ", ".join(f"{name.removeprefix('version.')} {version}" for name, version in versions().items())
        + ". Every ratio is between two things measured in turns in one run: its median over the rounds, the "
        "least and the most. Times are of CPU on a CPU, but under `roles` and `start`, where they are of the "
        "wall.",
        "",
        findings,
        "",
    ]
    for part in dict.fromkeys(each.part for each in figures):
        lines += [f"## {part}", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        lines += ["| " + " | ".join(row) + " |" for name, row in rows(figures) if name == part]
        lines.append("")
    path.write_text("\n".join(lines))


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(speed.peak(*sys.argv[2:]))
        return
    parser = ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_class_arguments(Settings, None)
    parser.add_argument("--fast", action="store_true", help="what CI prints, in a minute")
    if "--fast" in sys.argv:
        parser.set_defaults(asdict(FAST))
    options = parser.parse_args()
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for each in measured(settings):
        figures.append(each)
        if settings.out is not None:  # it takes a while
            print(json.dumps(asdict(each)), file=sys.stderr, flush=True)
    show(figures)
    if settings.out is not None:
        figures = [*kept(Path(f"{settings.out}.jsonl"), {each.part for each in figures}), *figures]
        figures.sort(key=lambda each: PARTS.index(each.part))
        Path(f"{settings.out}.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in figures))
        page(figures, Path(f"{settings.out}.md"))


if __name__ == "__main__":
    main()
