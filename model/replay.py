"""The student's gradient without its rollout's graph: all chunks' exit steps in one block-causal forward.

What a chunk is denoised from, and what later chunks see of it, are constants of the gradient (algorithm 1 of
Self Forcing). So it does not matter when or where they were made: given the inputs of the exit steps and the
frames that were committed, the exit calls of all chunks are one forward, in which every chunk sees itself and
the clean frames before it. Its gradient is the sequential one. The clean frames' keys are computed beside it,
without a gradient, as the rollout's commits did. Some chunks alone have their part of the gradient, and no
chunk needs another, so chunks can be shared out over ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.backbone import Past
from model.kv_cache import Window
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.schedule import FlowSchedule, clean, per_frame

COLUMNS = ("exits", "seen")


@dataclass(frozen=True)
class Exit:
    """The call of a chunk whose answer is the chunk."""

    chunk: int  # of those in `Tape.seen` and after
    x: Tensor  # [B, f, C, H, W]
    timestep: float
    sigma: float


@dataclass
class Tape:
    """What a rollout leaves for its gradient: latents only."""

    seen: list[Tensor] = field(default_factory=list)
    """Frames as they were committed, chunk by chunk; a given beginning is the first."""
    exits: list[Exit] = field(default_factory=list)
    """Of the chunks that carry a gradient, in order."""

    @property
    def frames(self) -> int:
        """Frames of the chunks that carry a gradient, which are a video's last ones."""
        return sum(each.x.shape[1] for each in self.exits)

    def columns(self) -> dict[str, Tensor]:
        """Its latents, to be sent, frame after frame: `COLUMNS`."""
        exits = torch.cat([each.x for each in self.exits], dim=1)
        return {"exits": exits, "seen": torch.cat([*self.seen, exits[:, :0]], dim=1)}

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], config: RolloutConfig, plan: RolloutPlan) -> "Tape":
        """The tape of a rollout of that plan, from its columns."""
        schedule, chunk, given = FlowSchedule(config.shift), config.chunk, plan.given_frames
        seen = columns["seen"]
        whole = [seen[:, :given]] * (given > 0) + list(seen[:, given:].split(chunk, dim=1))
        tape = cls([each for each in whole if each.shape[1]])
        noisy = columns["exits"].split(chunk, dim=1)
        for back, x in enumerate(noisy):
            start = plan.frames - (len(noisy) - back) * chunk
            steps = schedule.few_steps(config.steps_at(start))
            step = plan.exit_at(start)
            sigma = schedule.sigma(torch.tensor(steps)).tolist()[step]
            tape.exits.append(Exit((given > 0) + (start - given) // chunk, x, steps[step], sigma))
        return tape

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.seen, *(each.x for each in self.exits)))


def replay(
    network: Any, tape: Tape, context: Tensor, window: Window, *, chosen: Sequence[int] | None = None
) -> Tensor:
    """The frames [B, f, C, H, W] that carry a gradient, with its graph; `network` answers as a `Backbone`.

    `context` is the prompt embedding [B, text_len, text_dim] and `window` the rollout's. Where `chosen` names
    some of the tape's exits, in order, only those chunks' frames.
    """
    exits = tape.exits if chosen is None else [tape.exits[index] for index in chosen]
    sizes = [each.shape[1] for each in tape.seen]
    if (last := tape.exits[-1]).chunk == len(sizes):  # nothing sees the last chunk, so it is not committed
        sizes.append(last.x.shape[1])
    starts = list(accumulate([0, *sizes]))
    x = torch.cat([each.x for each in exits], dim=1)
    before = torch.cat([*tape.seen, x[:, :0]], dim=1)[:, : starts[exits[-1].chunk]]
    past = Past(before, tuple(sizes), tuple(each.chunk for each in exits))
    timestep, sigma = (
        torch.tensor([value for each in exits for value in [of(each)] * each.x.shape[1]], device=x.device)
        for of in (lambda each: each.timestep, lambda each: each.sigma)
    )
    velocity = network(x, timestep[None], context, past=past, window=window).velocity
    return clean(x, velocity.float(), per_frame(sigma[None], x))
