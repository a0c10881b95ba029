"""What models must agree on before one works with, or starts from, another, and what they may differ in.

Roles of a run share prompts' embeddings and latents, so the text encoder, the pixels' statistics and the
shape of a latent are the same in all of them. How a student generates is its run's own choice; what differs
from the model that it starts from is told, not refused.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from infra.settings import part
from model.transformer import TransformerConfig
from orchestrator.config import RunConfig
from workers.build import check_adapters
from workers.model_directory import ModelCard, ModelDirectory


def check_roles(config: RunConfig, models: Mapping[str, ModelDirectory]) -> list[str]:
    """What the student of this run does otherwise than the model that it starts from, one sentence each.

    Args:
        config: of a distillation.
        models: what `student`, `critic` and, where one is read, `teacher` start from.

    Raises:
        ValueError: a model does not fit the config or another one; names the setting.
    """
    sizes = {"teacher": config.teacher, "student": config.student, "critic": config.student}
    for role, model in models.items():
        name = "teacher" if role == "teacher" else "student"
        _check_fit(f"distill.{role}", model, config, sizes[role], name)
        _check_text(f"distill.{role}", model, "distill.student", models["student"])
    for role, settings in (
        ("student", config.distill.roles.student),
        ("critic", config.distill.roles.critic),
    ):
        with part(f"distill.roles.{role}.adapters"):
            check_adapters(models[role], settings.adapters)
    if (teacher := models.get("teacher")) and teacher.card.video.frames < config.video.frames:
        raise ValueError(
            f"distill.teacher at {teacher.path} is trained on {teacher.card.video.frames} frames, too short "
            f"for the {config.video.frames} video.frames that it would score."
        )
    return differences(f"distill.student at {models['student'].path}", models["student"].card, config)


def check_start(config: RunConfig, source: ModelDirectory) -> list[str]:
    """What an initial student does otherwise than `source`, the model that it starts from, one sentence each.

    Raises:
        ValueError: `source` does not fit the config; names the setting.
    """
    settings = config.initialize
    _check_fit("initialize.teacher", source, config, config.student, "student")
    with part("initialize.role.adapters"):
        check_adapters(source, settings.role.adapters)
    if source.card.video.frames != config.video.frames:
        raise ValueError(
            f"initialize.teacher at {source.path} is trained on {source.card.video.frames} frames, and "
            f"video.frames says {config.video.frames}; use the same."
        )
    wanted = settings.chosen.teacher
    if wanted == "causal" and not source.card.causal:
        raise ValueError(
            f"initialize.method {settings.method} needs a causal model at initialize.teacher, and the one at "
            f"{source.path} is bidirectional; make one with initialize.method teacher_forcing."
        )
    if wanted == "bidirectional" and source.card.causal:
        raise ValueError(
            f"initialize.method {settings.method} needs a bidirectional teacher, and the model at "
            f"{source.path} is causal; use one for causal teachers, such as causal_ode."
        )
    return differences(f"initialize.teacher at {source.path}", source.card, config)


def differences(start: str, card: ModelCard, config: RunConfig) -> list[str]:
    """Where this run's way to generate is not that of the model named `start`; none if bidirectional."""
    if card.rollout is None:
        return []
    pairs: list[tuple[str, Any, Any]] = [
        (f"rollout.{field.name}", getattr(card.rollout, field.name), getattr(config.rollout, field.name))
        for field in fields(card.rollout)
    ]
    pairs.append(("video.frames", card.video.frames, config.video.frames))
    return [
        f"{start} was made with {name} {_shown(old)}; this run has {_shown(new)}."
        for name, old, new in pairs
        if old != new
    ]


def _check_fit(
    setting: str, model: ModelDirectory, config: RunConfig, sizes: TransformerConfig, name: str
) -> None:
    """ValueError unless sizes, latents and the kind of text encoder are those of the config."""
    card, video = model.card, config.video
    if card.transformer != sizes:
        raise ValueError(
            f"{setting} at {model.path} has other sizes than `{name}` in this recipe; use a model of these "
            "sizes."
        )
    if card.video.shape[1:] != video.shape[1:]:
        raise ValueError(
            f"{setting} at {model.path} makes latents of {card.video.shape[1:]}, and `video` says "
            f"{video.shape[1:]}."
        )
    # Without a codec pixels have no statistics here.
    for field in ("codec", "pixel_mean", "pixel_std") if video.codec != "none" else ("codec",):
        old, new = getattr(card.video, field), getattr(video, field)
        if old != new:
            raise ValueError(
                f"{setting} at {model.path} was made with video.{field} {old}, and this recipe says {new}; "
                "its latents mean other pixels, so use the same."
            )
    if card.video.codec_digest() != video.codec_digest():
        raise ValueError(
            f"{setting} at {model.path} has another VAE than video.vae at {video.vae}; its latents mean "
            "other pixels, so use the same."
        )
    if card.text.encoder != config.text.encoder:
        raise ValueError(
            f"{setting} at {model.path} has text.encoder {card.text.encoder}, and this recipe says "
            f"{config.text.encoder}; use the same."
        )


def _check_text(setting: str, model: ModelDirectory, other: str, student: ModelDirectory) -> None:
    """ValueError unless both models are handed the same embeddings: those of the student's encoder."""
    if model.text_digest() != student.text_digest():
        raise ValueError(
            f"{setting} at {model.path} and {other} at {student.path} have text encoders of other weights; "
            "all roles read the same embeddings, so use models that come from one pretraining."
        )


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
