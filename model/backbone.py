"""What a rollout and a score need of a network, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.kv_cache import BlockCache, History, KeyValue, PromptSlots, SlotCache, Window
from model.sequence import SequenceGroup

EVERYTHING = Window(None, 0, "absolute")


class WeightSource(Protocol):
    """Named tensors read one at a time, such as an opened safetensors file."""

    def keys(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...


class Output(NamedTuple):
    """What one forward answers (a tuple, because ZeRO-3 hooks look into those)."""

    velocity: Tensor  # [B, F, C, H, W]
    live: list[KeyValue]  # keys and values of each layer as a cache stores them, where they are asked for
    hidden: list[Tensor]  # hidden states [B, L, D] after each tapped block
    time: Tensor | None  # time embedding [B, 1 or F, D], where blocks are tapped


@dataclass(frozen=True)
class Past:
    """What chunks of a video see of it besides themselves, as constants."""

    frames: Tensor  # clean, from the video's first on, [B, f, C, H, W]
    sizes: tuple[int, ...]  # of all its chunks, in frames
    chosen: tuple[int, ...]  # the chunks that are there, rising


class Backbone(nn.Module, ABC):
    """A network that predicts the velocity of a noisy latent video. `config` holds its sizes.

    Three ways of use: bidirectional (teacher, critic), block-causal over a whole sequence (initial students,
    forced inputs), and one live chunk against a constant history (rollout).
    """

    config: Any
    sequence: SequenceGroup | None = None
    """Ranks that share every forward but a rollout's, if there are others."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | Sequence[KeyValue],
        *,
        chunk: int | None = None,
        window: Window = EVERYTHING,
        clean: Tensor | None = None,
        past: Past | None = None,
        history: History | None = None,
        return_live: bool = False,
        taps: Sequence[int] = (),
    ) -> Output:
        """The velocity of noisy latents `x` [B, F, C, H, W], and what else is asked for.

        Args:
            timestep: [1], [B] or [B, F], 0..1000.
            context: [B, text_len, text_dim], or what `encode_context` made of that.
            chunk: where given, frames see their own chunk of so many and what `window` holds of earlier ones,
                as in a rollout; else every frame sees every frame.
            clean: a video like `x`; with `chunk`, the earlier frames seen are its own at timestep 0 instead
                of those of `x` (teacher forcing).
            past: where given, `x` are its chosen chunks, one after the other, each of which sees what
                `window` holds of the clean frames before it, at timestep 0, and no gradient flows into
                those.
            history: where given, all of `x` is one live chunk after it.
            return_live: also answer the live chunk's keys and values.
            taps: blocks, from 0, whose hidden states are answered too.

        Raises:
            ValueError: `chunk` does not divide F, or `clean` comes without a chunk or in another shape.
        """

    @abstractmethod
    def encode_context(self, context: Tensor) -> list[KeyValue]:
        """What each block's cross-attention reads of prompts [B, text_len, text_dim], for all calls."""

    @abstractmethod
    def new_cache(self, window: Window, height: int, width: int, device: torch.device | str) -> BlockCache:
        """An empty cache of one batch's rollout, through which gradients may flow; of latents' sizes."""

    @abstractmethod
    def new_slots(
        self,
        window: Window,
        height: int,
        width: int,
        *,
        rows: int,
        chunk: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> SlotCache:
        """Preallocated memory for rows of different ages (see `SlotCache`)."""

    @abstractmethod
    def new_prompts(self, rows: int, device: torch.device | str) -> PromptSlots:
        """Preallocated memory for what `encode_context` makes of a prompt a row."""


class Prepared(Protocol):
    """A network whose weights stand still."""

    def __call__(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        prompts: Sequence[KeyValue],
        *,
        history: History,
        return_live: bool = False,
    ) -> Output:
        """The velocity of one live chunk `x` [B, f, C, H, W] after its history, and what else is asked for.

        Args:
            timesteps: One a row, 0..1000.
            prompts: What `encode_context` made.
        """
        ...


def velocity_of(network: Any, x: Tensor, timestep: Tensor, context: Tensor, **how: Any) -> Tensor:
    """The velocity alone, for what integrates or guides one; arguments as for `Backbone.forward`."""
    return network(x, timestep, context, **how).velocity
