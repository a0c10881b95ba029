"""Many viewers' streams on one model: each has its own rollout, and a tick runs all in one batched forward.

Timesteps are per frame already, so streams need not be at the same denoising step: a new viewer joins at the
next tick, not at the next chunk. Memory is a fixed number of slots, allocated once. A newcomer is refused
where none is free; nobody is dropped or started again for another.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import count, product

import torch
from torch import Tensor

from model.families import prepared
from model.kv_cache import Parked
from model.noise import SampleNoise
from model.rollout import NetworkCall, Rollout
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.text import TextEncoder
from workers.build import check_weights, whole
from workers.model_directory import ModelDirectory

ENDLESS = 2**40
"""Chunks of a stream that has no end: at sixteen frames a second, thousands of years."""


class NoSlot(RuntimeError):
    """Every slot is taken; there is room when a stream ends."""


@dataclass
class Stream:
    """One viewer's stream. `Streamer` alone changes it."""

    number: int
    row: int | None  # its slot; none while it is parked
    rollout: Rollout
    prompt: str
    context: Tensor  # prompt embedding, [1, text_len, text_dim]
    next_prompt: tuple[str, Tensor, bool] | None = None
    """The prompt from the next chunk on, its embedding, and whether the past is encoded anew under it."""
    chunks: int = 0  # chunks that are finished
    new_prompt: bool = False  # whether the chunk that is being made is the first under a new prompt
    parked: Parked | None = None

    @property
    def between_chunks(self) -> bool:
        """Whether no step of its next chunk has been made."""
        return self.rollout.between_chunks


@dataclass(frozen=True)
class Event:
    """What a tick brought one stream: a chunk, or why it cannot go on."""

    stream: Stream
    chunk: Tensor | None = None  # latents [f, C, H, W]
    new_prompt: bool = False  # whether this is the first chunk under a new prompt
    last: bool = False  # whether the stream ends with it
    error: str | None = None


def check(model: str) -> tuple[ModelDirectory, RolloutConfig]:
    """The student at `model` and how it generates; ValueError where it cannot stream."""
    source = ModelDirectory(model)
    rollout = source.card.rollout
    if rollout is None or source.card.guidance:
        raise ValueError(f"the model at {model} is no few-step student; streaming needs one.")
    if rollout.window is None:
        raise ValueError(
            f"the student at {model} has no rollout.window, and its cache would grow for ever; streaming "
            "needs one."
        )
    check_weights(source)
    source.card.video.check()
    return source, rollout


@dataclass
class Streamer:
    """One student and its streams."""

    model: str
    slots: int
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )

    encoder: TextEncoder | None = None
    """What embeds prompts in place of the model's own encoder, as that would."""
    compiled: bool = False
    """Whether its calls go through TorchInductor, which takes a while when they are first made."""

    def __post_init__(self) -> None:
        source, self.config = check(self.model)
        self.card = source.card
        video = source.card.video
        self.network = whole(source, self.device)
        self.prepared = prepared(self.network, compiled=self.compiled, shared=True)
        self.text = self.encoder or source.text_encoder(self.device)
        self.cache = self.network.new_slots(
            self.config.context_window(),
            video.height,
            video.width,
            rows=self.slots,
            chunk=self.config.chunk,
            device=self.device,
        )
        self.prompts = self.network.new_prompts(self.slots, self.device)
        self.free = list(range(self.slots))
        self.streams: dict[int, Stream] = {}
        self._numbers = count()
        self._written: list[Tensor | None] = [None] * self.slots
        """The embeddings whose keys and values are in `prompts`."""

    @torch.inference_mode()
    def compile_all(self) -> None:
        """Have whatever is compiled be compiled now: for one row and several, at one step and age or
        several."""
        video, chunk = self.card.video, self.config.chunk
        for size in range(1, min(self.slots, 3) + 1):
            rows, numbers = list(range(size)), range(size)
            for steps, ages in product([[1.0] * size, [*map(float, numbers)]], [[0] * size, numbers]):
                self.prepared(
                    torch.zeros(size, chunk, *video.shape[1:], device=self.device),
                    steps,
                    self.prompts.join(rows),
                    history=self.cache.join(rows, [self.cache.phases(age, chunk) for age in ages]),
                    return_live=True,
                )

    def open(
        self, prompt: str, seed: int, frames: int | None = None, *, context: Tensor | None = None
    ) -> Stream:
        """A stream of `frames` latent frames, in whole chunks, or endless; NoSlot where every slot is taken.

        `context` is the prompt's embedding, where that is there already.
        """
        if not self.free:
            raise NoSlot(f"all {self.slots} slots are taken.")
        context = self.text.encode([prompt]) if context is None else context
        row, chunk = self.free.pop(0), self.config.chunk
        self.cache.row(row).rewind()
        video = self.card.video
        rollout = Rollout(
            self.config,
            RolloutPlan.full(self.config, chunk * (ENDLESS if frames is None else -(-frames // chunk))),
            noise=SampleNoise([(seed, "generate", 0)], self.device),
            cache=self.cache.row(row),
            shape=(1, video.channels, video.height, video.width),
        )
        stream = Stream(next(self._numbers), row, rollout, prompt, context)
        self.streams[stream.number] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """Free a stream's slot at once; closing it twice does nothing."""
        if self.streams.get(stream.number) is stream:
            del self.streams[stream.number]
            self._release(stream)

    def _release(self, stream: Stream) -> None:
        if stream.row is not None:
            self.free = sorted([*self.free, stream.row])
            stream.row = None

    def change_prompt(
        self, stream: Stream, prompt: str, *, reencode: bool = True, context: Tensor | None = None
    ) -> None:
        """Another prompt from the next chunk on, with the past encoded anew under it unless told not to."""
        context = self.text.encode([prompt]) if context is None else context
        stream.next_prompt = (prompt, context, reencode)

    def park(self, stream: Stream) -> None:
        """Move a stream's cache to host memory and free its slot, until `unpark`."""
        if stream.row is not None:
            stream.parked = self.cache.park(stream.row)
            self._release(stream)

    def unpark(self, stream: Stream) -> None:
        """Go on with a parked stream; NoSlot where every slot is taken."""
        if stream.parked is None:
            return
        if not self.free:
            raise NoSlot(f"all {self.slots} slots are taken.")
        stream.row = self.free.pop(0)
        self.cache.unpark(stream.row, stream.parked)
        stream.rollout.cache = self.cache.row(stream.row)
        stream.parked = None

    def follows(self, other: "Streamer") -> bool:
        """Whether streams of `other` can go on here: they are of one shape, and generated in one way."""
        ours, theirs = self.card.video, other.card.video
        # Each model brings its own copy of a VAE.
        same = replace(ours, vae=theirs.vae) == theirs if ours.codec == theirs.codec else False
        return self.config == other.config and same and ours.codec_digest() == theirs.codec_digest()

    def adopt(self, stream: Stream) -> None:
        """Go on, between two chunks, with a stream that another streamer closed: what it showed is encoded.

        NoSlot where every slot is taken.
        """
        if not self.free:
            raise NoSlot(f"all {self.slots} slots are taken.")
        # What can fail comes before the slot is taken.
        stream.context = self.text.encode([stream.prompt])
        if stream.next_prompt is not None:
            prompt, _, reencode = stream.next_prompt
            self.change_prompt(stream, prompt, reencode=reencode)
        stream.rollout.cache = self.cache.row(self.free[0])
        stream.rollout.reencode()
        stream.row, stream.number = self.free.pop(0), next(self._numbers)
        self.streams[stream.number] = stream

    @torch.inference_mode()
    def tick(self, *, paused: Collection[int] = ()) -> list[Event]:
        """One forward of every stream that is neither parked nor `paused` (numbers), and what came of it.

        It is computed for all before anything changes: a row that is not finite ends its own stream alone.
        """
        running = [
            stream
            for stream in sorted(self.streams.values(), key=lambda stream: stream.row or 0)
            if stream.row is not None and stream.number not in paused
        ]
        calls: dict[int, list[tuple[Stream, NetworkCall]]] = defaultdict(list)
        for stream in running:
            call = self._next_call(stream)
            # All are of one chunk, but for a past that is written anew, whose oldest piece may be shorter.
            calls[call.x.shape[1]].append((stream, call))
        return [event for together in calls.values() for event in self._forward(together)]

    def _next_call(self, stream: Stream) -> NetworkCall:
        """What a stream needs next; between two chunks it first takes the prompt that waits for it."""
        if stream.between_chunks:
            reencode = False
            if stream.next_prompt is not None:
                stream.prompt, stream.context, reencode = stream.next_prompt
                stream.next_prompt, stream.new_prompt = None, True
            stream.rollout.send(reencode and bool(stream.rollout.past))
        call = stream.rollout.pending
        assert isinstance(call, NetworkCall), "a stream is closed with its last chunk"
        return call

    def _forward(self, together: list[tuple[Stream, NetworkCall]]) -> list[Event]:
        """One batched forward of calls of equal length."""
        streams, calls = [stream for stream, _ in together], [call for _, call in together]
        x = torch.cat([call.x for call in calls])
        rows = [stream.row for stream in streams if stream.row is not None]
        for row, stream in zip(rows, streams, strict=True):
            if self._written[row] is not stream.context:
                self.prompts.write(row, self.network.encode_context(stream.context))
                self._written[row] = stream.context
        velocity, live, *_ = self.prepared(
            x,
            [call.timestep for call in calls],
            self.prompts.join(rows),
            history=self.cache.join(rows, [call.history.phase for call in calls]),
            return_live=True,
        )
        finite = velocity.flatten(1).isfinite().all(1).tolist()
        events: list[Event] = []
        for index, (stream, call) in enumerate(together):
            if not finite[index]:
                self.close(stream)
                events.append(Event(stream, error="the model's answer is not finite"))
                continue
            part = slice(index, index + 1)
            kept = [(key[part], value[part]) for key, value in live] if call.keeps_live else []
            stream.rollout.send((velocity[part], kept))
            if isinstance(chunk := stream.rollout.pending, Tensor):
                events.append(self._deliver(stream, chunk[0]))
        return events

    def _deliver(self, stream: Stream, chunk: Tensor) -> Event:
        stream.chunks += 1
        applied, stream.new_prompt = stream.new_prompt, False
        stream.rollout.send()
        last = stream.rollout.pending is None
        if last:
            self.close(stream)
        return Event(stream, chunk=chunk, new_prompt=applied, last=last)
