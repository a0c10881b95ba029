"""What was measured, as tables for a terminal and for a page, and against what was asked for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipelines.console import console
from tests.benchmarks.engine import (
    ON_TIME,
    Batching,
    Capacity,
    Endless,
    Latency,
    Recomputing,
    Spread,
)
from tests.benchmarks.service import Overhead, Promotion, Proxy

COMPARED = 8
"""Viewers for whom a batch is compared with what it replaces."""
PROXIES: dict[Proxy, str] = {"serve": "Serve's proxy", "haproxy": "HAProxy"}
BEGIN, END = "<!-- findings -->", "<!-- /findings -->"

Row = Sequence[str]


@dataclass(frozen=True)
class Measured:
    """One student's figures."""

    name: str
    parameters: int
    cache_bytes: int
    """Of one session."""
    latency: Sequence[Latency]
    batching: Sequence[Batching]
    capacity: Sequence[Capacity]
    endless: Endless
    recomputing: Sequence[Recomputing]
    overhead: Sequence[Overhead]
    promotion: Sequence[Promotion]


@dataclass(frozen=True)
class Goal:
    """What the service is asked for, and what it does."""

    what: str
    value: float
    asked: str
    met: bool


def goals(measured: Measured) -> Iterator[Goal]:
    for one in measured.batching:
        if one.viewers == COMPARED:
            ratio = one.batch / one.interleaved
            yield Goal(
                f"frames a second, {COMPARED} viewers in a batch over interleaved",
                ratio,
                "at least 2",
                ratio >= 2,
            )
    for each in measured.latency:
        if each.viewers == COMPARED:
            first = each.first.p95
            yield Goal(f"seconds to the first frame, {COMPARED} viewers, p95", first, "under 1", first < 1)
    end = measured.endless
    ratio = end.late.median / end.early.median
    yield Goal(f"chunk time at frame {end.frames} over frame 100", ratio, "at most 1.05", ratio <= 1.05)
    grown = end.grown / 2**20
    yield Goal("memory grown between them, MiB", grown, "none (under 1)", grown < 1)
    for again in measured.recomputing:
        ratio = again.recomputed.median / again.cached.median
        what = f"rolling cache over recomputing a window of {again.window}, {_viewers(again.viewers)}"
        yield Goal(what, ratio, "at least 3.5", ratio >= 3.5)
    for served in measured.overhead:
        share = served.service.median / served.engine.median - 1
        how = f"{_viewers(served.viewers)}, {served.format}, {PROXIES[served.proxy]}"
        what = f"share of chunk time that Serve and HTTP add, {how}"
        yield Goal(what, share, "under 0.1", share < 0.1)
    for promoted in measured.promotion:
        what = f"promotion ({promoted.on_promotion}), {_viewers(promoted.viewers)}"
        yield Goal(f"{what}: streams cut", promoted.cut, "none", promoted.cut == 0)
        ratio = promoted.longest / promoted.usual
        yield Goal(f"{what}: longest gap, in chunk times", ratio, "under 2", ratio < 2)


def tables(measured: Measured) -> Iterator[tuple[str, Row, list[Row]]]:
    """Title, head and rows of each table. Times are milliseconds, median / p95."""
    yield (
        "What was asked",
        ("", "measured", "asked for", "met"),
        [
            (goal.what, f"{goal.value:.3g}", goal.asked, "yes" if goal.met else "no")
            for goal in goals(measured)
        ],
    )
    yield (
        "The engine: a newcomer's first frames, everybody's chunks, and frames a second in all",
        (
            "viewers",
            "first frames, ms",
            "chunk, ms",
            "batch, frames/s",
            "interleaved, frames/s",
            "batch gains",
        ),
        [
            (
                f"{one.viewers}",
                _ms(one.first),
                _ms(one.chunk),
                f"{two.batch:.1f}",
                f"{two.interleaved:.1f}",
                f"{two.batch / two.interleaved:.2f}×",
            )
            for one, two in zip(measured.latency, measured.batching, strict=True)
        ],
    )
    yield (
        f"Sessions that a replica holds with {ON_TIME:.0%} of chunks on time",
        ("frames/s asked for", "sessions", "chunks on time", "frames/s in all"),
        [
            (
                f"{one.fps:g}",
                f"{one.sessions}" if one.limited else f"at least {one.sessions}",
                "–" if math.isnan(one.on_time) else f"{one.on_time:.2%}",
                f"{one.sessions * one.fps:g}",
            )
            for one in measured.capacity
        ],
    )
    end = measured.endless
    yield (
        "An endless stream",
        ("frame", "chunk, ms", "memory grown since, MiB"),
        [("100", _ms(end.early), "–"), (f"{end.frames}", _ms(end.late), f"{end.grown / 2**20:.1f}")],
    )
    yield (
        "Rolling cache against recomputing the window",
        ("window, frames", "viewers", "cached, ms a chunk", "recomputed, ms", "cache gains"),
        [
            (
                f"{one.window}",
                f"{one.viewers}",
                _ms(one.cached),
                _ms(one.recomputed),
                f"{one.recomputed.median / one.cached.median:.2f}×",
            )
            for one in measured.recomputing
        ],
    )
    if measured.overhead:
        yield (
            "Through Serve, HTTP and WebSocket",
            (
                "proxy",
                "viewers",
                "format",
                "first frames, ms",
                "engine's chunk, ms",
                "viewer's chunk, ms",
                "added",
            ),
            [
                (
                    PROXIES[one.proxy],
                    f"{one.viewers}",
                    one.format,
                    _ms(one.first),
                    _ms(one.engine),
                    _ms(one.service),
                    f"{one.service.median / one.engine.median - 1:.0%}",
                )
                for one in measured.overhead
            ],
        )
    if measured.promotion:
        yield (
            "A new version under load",
            ("running streams", "viewers", "cut", "usual gap, ms", "longest gap, ms"),
            [
                (
                    one.on_promotion,
                    f"{one.viewers}",
                    f"{one.cut}",
                    f"{1000 * one.usual:.0f}",
                    f"{1000 * one.longest:.0f}",
                )
                for one in measured.promotion
            ],
        )


def show(measured: Measured) -> None:
    for title, head, rows in tables(measured):
        table = Table(title=f"{measured.name}: {title}")
        for column, name in enumerate(head):
            table.add_column(name, justify="left" if column == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_page(path: Path, results: Sequence[Measured], machine: str, command: str) -> None:
    """The page at `path`; what a person wrote there about the figures stays."""
    lines = [
        "# The speed of streaming",
        "",
        f"`{command}` on {machine}. Times are medians / 95th percentiles.",
        "",
        _findings(path),
        "",
    ]
    for measured in results:
        lines += [
            f"## The {measured.name} student",
            "",
            f"{measured.parameters / 1e6:.2g} M parameters; a session's cache takes "
            f"{measured.cache_bytes / 2**20:.2g} MiB.",
            "",
        ]
        for title, head, rows in tables(measured):
            lines += [f"### {title}", ""]
            lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]
    path.write_text("\n".join(lines))


def _findings(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    if BEGIN in text and END in text:
        return text[text.index(BEGIN) : text.index(END) + len(END)]
    return f"{BEGIN}\n{END}"


def _viewers(number: int) -> str:
    return "1 viewer" if number == 1 else f"{number} viewers"


def _ms(spread: Spread) -> str:
    digits = 0 if spread.median >= 0.1 else 1
    return f"{1000 * spread.median:.{digits}f} / {1000 * spread.p95:.{digits}f}"
