"""How much memory a rank of each role of a distillation takes, by arithmetic, before anything starts.

The sums are of what is as large as a model or a video; a process takes more beside that (the device's
context, communication buffers, fragments: 2.6 to 6.5 GiB were seen at 1.3B). What a network keeps for its
backward pass was counted tensor by tensor and is held to 10 % by a test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from model.adapters import AdapterConfig
from model.families import on_meta
from model.transformer import TransformerConfig
from orchestrator.config import RunConfig
from orchestrator.stages import AdaptedRole
from workers.zero import DTYPES

GIB = 2**30

SAVED_BY_BLOCK = (22.5, 2.0)
"""Numbers a token that one block keeps for its backward pass, in widths and in widths of its ffn."""
SAVED_BESIDE = 4.0
"""Numbers a token kept outside the blocks, in widths."""


@dataclass(frozen=True)
class Rank:
    """What one rank holds at its fullest, in bytes."""

    role: str
    ranks: int
    videos: int  # that go through it at once
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def saved_for_backward(sizes: TransformerConfig, tokens: int, itemsize: int, *, checkpointing: bool) -> float:
    """Bytes that a forward of `tokens` keeps for its backward pass.

    With checkpointing at the fullest of that: the input of every block, and what the one that is being
    recomputed keeps.
    """
    wide, ffn = SAVED_BY_BLOCK
    block = tokens * (wide * sizes.dim + ffn * sizes.ffn_dim)
    beside = tokens * SAVED_BESIDE * sizes.dim
    blocks = block * sizes.num_layers if not checkpointing else tokens * sizes.dim * sizes.num_layers + block
    return itemsize * (blocks + beside)


def passing(sizes: TransformerConfig, tokens: int, itemsize: int) -> float:
    """Bytes that a forward of `tokens` without a gradient takes at its fullest, in one block."""
    return itemsize * tokens * (8 * sizes.dim + SAVED_BY_BLOCK[1] * sizes.ffn_dim)


def keys_and_values(sizes: TransformerConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the cached keys and values of `tokens`."""
    return 2 * itemsize * sizes.num_layers * sizes.dim * tokens


def state_of(sizes: TransformerConfig, role: AdaptedRole) -> dict[str, float]:
    """Bytes of weights, gradients, AdamW's state and average that a rank of a role that learns holds."""
    engine, all_of_them = role.engine, sizes.parameters()
    trained = learned(sizes, role.adapters) if role.adapters.rank else all_of_them
    frozen, low = (all_of_them if role.adapters.rank else 0), DTYPES[engine.dtype].itemsize
    stage, share = engine.zero_stage, role.ranks
    weights = low * (trained + frozen) / (share if stage == 3 else 1)
    # fp32 masters, gradients and two moments; in fp32 without sharding the weights are their own masters.
    masters = 0 if engine.dtype == "fp32" and stage == 0 else 4 * trained
    host = 0 if engine.offload else 1
    return {
        "weights": weights,
        "gradients": 4 * trained / (share if stage >= 2 else 1),
        "optimizer": host * (8 * trained + masters) / (share if stage >= 1 else 1),
        "average": 4 * trained / share if engine.ema_decay is not None else 0,
    }


def made_ready(sizes: TransformerConfig, role: AdaptedRole, itemsize: int, *, gathered: bool) -> float:
    """Bytes of the copies of weights with which a student rolls out: those of one product for queries, keys
    and values, those with an adapter's added, or all where they are gathered."""
    if role.engine.zero_stage == 3:
        return itemsize * sizes.parameters() if gathered else 0
    layers = role.adapters.layers(on_meta(sizes)) if role.adapters.rank else {}
    elsewhere = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.k", "cross_attn.v")
    adapted = sum(layer.weight.numel() for name, layer in layers.items() if not name.endswith(elsewhere))
    return itemsize * (3 * sizes.dim**2 * sizes.num_layers + adapted)


def learned(sizes: TransformerConfig, adapters: AdapterConfig) -> int:
    """How many weights adapters have."""
    layers = adapters.layers(on_meta(sizes)).values()
    return sum(adapters.rank * (layer.in_features + layer.out_features) for layer in layers)


def plan(config: RunConfig) -> list[Rank]:
    """What a rank of each role of this distillation holds."""
    distill, video = config.distill, config.video
    roles, rows, columns = distill.roles, *config.student.grid(video.height, video.width)
    frame = rows * columns
    student, critic, teacher = roles.student, roles.critic, roles.teacher
    micro = distill.batch // student.engine.accumulation

    videos = micro // student.ranks
    longest, chunk = distill.rollout_frames or video.frames, config.rollout.chunk
    sizes, low, tokens = config.student, DTYPES[student.engine.dtype].itemsize, videos * frame
    checkpointing = student.activation_checkpointing
    # The graphs of all chunks' calls are kept until the whole video is judged. At the last chunk there is
    # either its own, with what a block keeps while it is recomputed and a window joined for it, or, in the
    # steps before it, the window joined for every layer.
    graph = saved_for_backward(sizes, chunk * tokens, low, checkpointing=checkpointing)
    kept = low * chunk * tokens * sizes.dim * sizes.num_layers if checkpointing else graph
    past = min(longest, config.rollout.window or longest) - chunk
    joined = keys_and_values(sizes, past * tokens, low)
    now = max(graph + joined / sizes.num_layers, joined + passing(sizes, chunk * tokens, low))
    rolling = joined + passing(sizes, chunk * tokens, low)
    activations = (video.frames // chunk - 1) * kept + now
    if distill.replay:
        # All chunks' calls are one, beside which the clean frames pass, whose keys and values it keeps.
        whole = video.frames * tokens
        graph = saved_for_backward(sizes, whole, low, checkpointing=checkpointing)
        activations = graph + keys_and_values(sizes, whole, low) + passing(sizes, whole, low)
    cache = keys_and_values(sizes, longest * tokens, low)
    ready = made_ready(sizes, student, low, gathered=distill.gather)
    parts = {
        **state_of(sizes, student),
        "ready": 0 if roles.rollout.ranks else ready,
        "cache": 0 if roles.rollout.ranks else cache,
        "activations": activations,
    }
    found = [Rank("student", student.ranks, videos, parts)]
    if replicas := roles.rollout.ranks:
        videos, share, low = micro // replicas, student.ranks / replicas, DTYPES[roles.rollout.dtype].itemsize
        made = {"cache": cache * share, "activations": rolling * share}
        found.append(Rank("rollout", replicas, videos, {"weights": low * sizes.parameters(), **made}))
    whole = video.frames * frame
    flows = bool(distill.objective.flows)
    if distill.needs_teacher:
        videos = micro // teacher.groups
        sizes, low = config.teacher, DTYPES[teacher.dtype].itemsize
        weights = low * sizes.parameters() / (teacher.ranks if teacher.zero_stage == 3 else 1)
        tokens = 2 * videos * whole // teacher.sequence  # with and without the prompt
        kept = saved_for_backward(sizes, tokens, low, checkpointing=True)
        parts = {"weights": weights, "activations": kept if flows else passing(sizes, tokens, low)}
        if teacher.zero_stage == 3:
            parts["gathered"] = 2 * low * sizes.parameters() / sizes.num_layers
        found.append(Rank("teacher", teacher.ranks, videos, parts))
    videos = distill.batch // critic.engine.accumulation // critic.groups
    low, judge = DTYPES[critic.engine.dtype].itemsize, distill.discriminator
    # A discriminator also looks at data, and at both again with noise for the penalties, in one graph.
    looks = 1 + (1 + bool(judge.r1_weight) + bool(judge.r2_weight) if judge.taps else 0)
    seen = max(looks * videos, micro // critic.groups if flows else 0)
    kept = saved_for_backward(
        config.student, seen * whole // critic.sequence, low, checkpointing=critic.activation_checkpointing
    )
    found.append(
        Rank("critic", critic.ranks, videos, {**state_of(config.student, critic), "activations": kept})
    )
    return found


def alternatives(config: RunConfig) -> list[str]:
    """Settings of a student update that this recipe leaves out, a sentence each with what they would bring
    and take. Arithmetic only: the recipe alone decides, as they are part of what a run's numbers follow
    from."""
    distill, rollout = config.distill, config.rollout
    found: list[str] = []
    if distill.inputs != "rollout":
        return found
    student, chunks = distill.roles.student, config.video.frames // rollout.chunk
    low, whole = DTYPES[student.engine.dtype].itemsize, config.student.parameters()
    if student.engine.zero_stage == 3 and not distill.gather and not distill.roles.rollout.ranks:
        received = low * whole * (student.ranks - 1) / student.ranks / 1e9
        calls = chunks * (len(rollout.steps) + 1)
        found.append(
            f"distill.gather: a student rank holds {low * whole / GIB:.1f} GiB more while it rolls out, and "
            f"receives {received:.1f} GB of weights a rollout in place of {calls * received:.0f}."
        )
    if not distill.replay and distill.cache_gradient == "constant":
        # Forwards a chunk: the steps up to the exit and the commit, or clean and noisy frames at once; and
        # for the backward pass two, or three where it computes the forward again.
        steps, back = len(rollout.steps), 3 if student.activation_checkpointing else 2
        last, mean = ((2 + back) / (calls + 1 + back) for calls in (steps, (steps + 1) / 2))
        roles = replace(distill.roles, rollout=replace(distill.roles.rollout, ranks=1, dtype="bf16"))
        changed = plan(replace(config, distill=replace(distill, gather=False, replay=True, roles=roles)))
        then = {rank.role: rank for rank in changed}
        now = next(rank for rank in plan(config) if rank.role == "student")
        found.append(
            f"distill.replay with distill.roles.rollout.ranks: a student update takes {last:.2f} of the "
            f"forwards at the last exit step and {mean:.2f} at the mean one, a student rank "
            f"{then['student'].total / GIB:.1f} GiB in place of {now.total / GIB:.1f}, and a replica in bf16 "
            f"{then['rollout'].parts['weights'] / GIB:.1f} GiB of weights beside its videos' caches."
        )
    return found
