"""What one process does: rollouts, updates and cycles, side by side in turns.

Every figure is a ratio of two things measured in the same rounds of one run: a machine's speed changes from
minute to minute, and with it seconds, but hardly what one thing costs of another.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.families import prepared
from model.noise import SampleNoise
from model.objectives.flow_matching import flow_matching_loss
from model.replay import Tape, replay
from model.rollout import NetworkCall, Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.sampler import guide
from model.schedule import FlowSchedule
from model.transformer import TransformerConfig, WanTransformer

SMALL = ("tiny", "quickstart")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Size:
    """A model, the latents that it makes, and how it makes them."""

    network: TransformerConfig
    side: tuple[int, int]  # rows and columns of latents
    frames: int = 21
    batch: int = 1
    rollout: RolloutConfig = RolloutConfig()
    dtype: torch.dtype = torch.float32


SIZES = {
    "quickstart": Size(TransformerConfig(), (8, 8)),
    "30M": Size(
        TransformerConfig(
            dim=384, ffn_dim=1536, num_heads=6, num_layers=12, in_dim=16, out_dim=16, freq_dim=256
        ),
        (16, 16),
    ),
    # One block of the full width, with frames small enough for a CPU.
    "wan-block": Size(
        TransformerConfig(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=1, in_dim=16, out_dim=16, freq_dim=256,
            text_len=512, text_dim=4096,
        ),
        (20, 26),
        frames=6,
    ),
    # For a card: the release's sizes at 480p, in bf16, with the window of a stream.
    "wan-1.3b": Size(
        TransformerConfig(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, freq_dim=256,
            text_len=512, text_dim=4096,
        ),
        (60, 104),
        rollout=RolloutConfig(window=21),
        dtype=torch.bfloat16,
    ),
    "wan-1.3b-framewise": Size(
        TransformerConfig(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, freq_dim=256,
            text_len=512, text_dim=4096,
        ),
        (60, 104),
        rollout=RolloutConfig(window=21, chunk=1),
        dtype=torch.bfloat16,
    ),
    "tiny": Size(
        TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_len=4), (4, 4), frames=6
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """What a thing takes of another: the median over rounds, the least and the most."""

    part: str
    size: str
    what: str
    against: str
    ratio: float
    low: float
    high: float
    value: float
    """Median of the thing itself, in `unit`."""
    unit: str


def clock() -> float:
    """Seconds: of this process's CPU, which neighbours hardly change, or of the device."""
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(work: Callable[[], Any]) -> float:
    began = clock()
    work()
    return clock() - began


def paired(
    part: str, size: str, things: Mapping[str, Callable[[], Any]], rounds: int, *, per: int = 1
) -> Iterator[Figure]:
    """All things in turns, against the first; milliseconds `per` so many."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for work in things.values():
        work()
    for _ in range(rounds):
        for name, work in things.items():
            seconds[name].append(timed(work))
    base = next(iter(things))
    for name, taken in seconds.items():
        yield figure(part, size, name, base, taken, seconds[base], [1e3 * each / per for each in taken], "ms")


def figure(
    part: str,
    size: str,
    what: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    values: Sequence[float],
    unit: str,
) -> Figure:
    ratios = [one / two for one, two in zip(ours, theirs, strict=True)]
    return Figure(part, size, what, against, median(ratios), min(ratios), max(ratios), median(values), unit)


class Bench:
    """One size with random weights, and what is done with it."""

    def __init__(self, name: str, dtype: torch.dtype | None = None):
        torch.manual_seed(0)
        self.size = size = SIZES[name]
        with DEVICE:
            self.network = WanTransformer(size.network).to(dtype or size.dtype)
            torch.nn.init.normal_(self.network.head.head.weight, std=0.02)
            text = (size.batch, size.network.text_len, size.network.text_dim)
            self.context = torch.randn(text).to(self.network.dtype)
            self.cotangent = torch.randn(size.batch, size.frames, *self.shape)
        self.chunks = size.frames // size.rollout.chunk

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent frame."""
        return self.size.network.in_dim, *self.size.side

    def rollout(self, exit_step: int = -1, *, slots: bool = False, **plan: Any) -> Rollout:
        size, config = self.size, self.size.rollout
        steps = range(len(config.steps))
        window = (config.context_window(), *size.side)
        made: Any = {"rows": size.batch, "chunk": config.chunk, "capacity": size.frames, "device": DEVICE}
        return Rollout(
            config,
            RolloutPlan(size.frames, steps[exit_step], **plan),
            noise=SampleNoise([(0, row) for row in range(size.batch)], DEVICE),
            cache=self.network.new_slots(*window, **made)
            if slots
            else self.network.new_cache(*window, DEVICE),
            shape=(size.batch, *self.shape),
        )

    def video(self, exit_step: int = -1, *, ready: Any = None, sharded: bool = False, **how: Any) -> Tensor:
        rollout = self.rollout(exit_step, **how)
        return torch.cat(list(generate(self.network, rollout, self.context, ready=ready, sharded=sharded)), 1)

    @torch.inference_mode()
    def served(self, ready: Any) -> Tensor:
        return self.video(slots=True, ready=ready)

    def arithmetic(self) -> None:
        """The products and the attention of a rollout, and nothing else."""
        sizes, config = self.size.network, self.size.rollout
        tokens = sizes.grid(*self.size.side)[0] * sizes.grid(*self.size.side)[1] * config.chunk
        batch, heads, dtype = self.size.batch, sizes.num_heads, self.network.dtype

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=dtype)

        x, wide = made(batch * tokens, sizes.dim), made(batch * tokens, sizes.ffn_dim)
        square, up = made(sizes.dim, sizes.dim), made(sizes.ffn_dim, sizes.dim)
        down, q = made(sizes.dim, sizes.ffn_dim), made(batch, heads, tokens, sizes.head_dim)
        text = made(batch, heads, sizes.text_len, sizes.head_dim)
        with torch.inference_mode():
            for chunk in range(self.chunks):
                seen = tokens * min(chunk + 1, (config.window or self.size.frames) // config.chunk)
                past = made(batch, heads, seen, sizes.head_dim)
                for _ in range(sizes.num_layers * (len(config.steps) + (chunk + 1 < self.chunks))):
                    for _ in range(6):  # q, k, v and o of self-attention, q and o of cross-attention
                        F.linear(x, square)
                    F.scaled_dot_product_attention(q, past, past)
                    F.scaled_dot_product_attention(q, text, text)
                    F.linear(x, up)
                    F.linear(wide, down)

    def sequential(self, exit_step: int = -1) -> None:
        """A student's gradient through its rollout."""
        self._pull(self.video(exit_step, grad_frames=self.size.frames))

    def recorded(self, exit_step: int = -1) -> Tape:
        rollout = self.rollout(exit_step, grad_frames=self.size.frames, replayed=True)
        for _ in generate(self.network, rollout, self.context):
            pass
        return rollout.tape

    def replayed(self, tape: Tape) -> None:
        """The same gradient, the rollout having been made."""
        self._pull(replay(self.network, tape, self.context, self.size.rollout.context_window()))

    def everything(self) -> None:
        """Full backpropagation: through every step of every chunk."""
        rollout, chunks = self.rollout(grad_frames=self.size.frames), []
        while (pending := rollout.pending) is not None:
            if isinstance(pending, NetworkCall):
                at = torch.full((1,), pending.timestep, device=DEVICE)
                how: Any = {"history": pending.history, "return_live": pending.keeps_live}
                velocity, live, *_ = self.network(pending.x, at, self.context, **how)
                rollout.send((velocity, live))
            else:
                chunks += [pending] if isinstance(pending, Tensor) else []
                rollout.send()
        self._pull(torch.cat(chunks, dim=1))

    def _pull(self, video: Tensor) -> None:
        (video * self.cotangent).sum().backward()
        self.network.zero_grad(set_to_none=True)

    def critic(self) -> None:
        """One update's gradient of flow matching on a video."""
        schedule, video = FlowSchedule(5.0), self.cotangent
        noise, timestep = torch.randn_like(video), torch.full((self.size.batch,), 500.0, device=DEVICE)
        noisy = schedule.add_noise(video, noise, timestep)
        velocity = self.network(noisy, timestep, self.context).velocity
        flow_matching_loss(velocity.float(), noise, video).backward()
        self.network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def teacher(self) -> None:
        """A guided score."""
        timestep = torch.full((2 * self.size.batch,), 500.0, device=DEVICE)
        both = self.network(self.cotangent.repeat(2, 1, 1, 1, 1), timestep, self.context.repeat(2, 1, 1))
        guide(*both.velocity.chunk(2), 3.0)


def rollouts(name: str, rounds: int, *, compiled: bool) -> Iterator[Figure]:
    """A rollout without gradient, milliseconds a chunk."""
    bench = Bench(name)
    bench.network.requires_grad_(False).eval()
    own = prepared(bench.network)
    things: dict[str, Callable[[], Any]] = {
        "bare products and attention": bench.arithmetic,
        "network asked at every call": lambda: bench.video(sharded=True),
        "rollout in training": bench.video,
        "rollout served": lambda: bench.served(own),
    }
    if compiled:
        fast = prepared(bench.network, compiled=True)
        things["rollout served, compiled"] = lambda: bench.served(fast)
    if compiled and bench.network.dtype == torch.float32:
        low = Bench(name, torch.bfloat16)
        half = prepared(low.network.requires_grad_(False).eval())
        things["rollout served, bf16"] = lambda: low.served(half)
    yield from paired("rollout", name, things, rounds, per=bench.chunks)


def updates(name: str, rounds: int) -> Iterator[Figure]:
    """Gradients of one micro-batch, milliseconds each, and a cycle of one student and five critic updates."""
    bench = Bench(name)
    tapes = [bench.recorded(step) for step in range(len(bench.size.rollout.steps))]
    last = tapes[-1]
    yield from paired(
        "update",
        name,
        {
            "student, sequential, last exit step": bench.sequential,
            "student, replay of a rollout made elsewhere": lambda: bench.replayed(last),
            "student, rollout and replay": lambda: (bench.recorded(), bench.replayed(last)),
            "student, backpropagation through all steps": bench.everything,
            "critic": bench.critic,
            "teacher, guided": bench.teacher,
        },
        rounds,
    )

    def every(update: Callable[[int], Any]) -> Callable[[], None]:
        return lambda: [update(step) for step in range(len(tapes))] and None

    yield from paired(
        "update",
        name,
        {
            "student, sequential, mean of exit steps": every(bench.sequential),
            "student, replay, mean of exit steps": every(lambda step: bench.replayed(tapes[step])),
        },
        rounds,
        per=len(tapes),
    )
    steps = range(len(tapes))

    def cycle(exits: Sequence[int]) -> None:
        bench.sequential(exits[0])
        bench.teacher()
        with torch.no_grad():
            bench.network(bench.cotangent, torch.full((1,), 500.0, device=DEVICE), bench.context)
        for step in exits[1:]:
            bench.video(step)
            bench.critic()

    exits = [step % len(steps) for step in range(6)]
    yield from paired(
        "cycle",
        name,
        {
            "one student and five critic updates": lambda: cycle(exits),
            "five critic updates alone": lambda: [bench.critic() for _ in range(5)],
            "six rollouts alone": lambda: [bench.video(step) for step in exits],
        },
        max(2, rounds // 3),
    )


MEMORY: Mapping[str, Callable[[Bench], Any]] = {
    "student, backpropagation through all steps": lambda bench: bench.everything(),
    "student, sequential": lambda bench: bench.sequential(),
    "student, replay": lambda bench: bench.replayed(bench.recorded()),
    "student, sequential, recomputed": lambda bench: bench.sequential(),
    "student, replay, recomputed": lambda bench: bench.replayed(bench.recorded()),
}


def peak(name: str, what: str) -> float:
    """MiB that an update takes beside the weights; of this process, so once in each."""
    bench = Bench(name)
    bench.network.activation_checkpointing = what.endswith("recomputed")
    short = Bench("tiny")
    short.network.activation_checkpointing = bench.network.activation_checkpointing
    short.sequential()  # what PyTorch imports and keeps for itself
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        MEMORY[what](bench)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports
    before = _kib("VmRSS")
    MEMORY[what](bench)
    return (_kib("VmHWM") - before) / 2**10


def _kib(name: str) -> float:
    """A line of this process's status, proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def memory(name: str, rounds: int) -> Iterator[Figure]:
    """Peak of one student update, each in a process of its own."""
    taken: dict[str, list[float]] = {what: [] for what in MEMORY}
    for _ in range(min(rounds, 3)):
        for what, values in taken.items():
            words = [sys.executable, "-m", "tests.benchmarks", "--peak", name, what]
            values.append(float(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    base = next(iter(taken))
    for what, values in taken.items():
        yield figure("memory", name, what, base, values, taken[base], values, "MiB")
