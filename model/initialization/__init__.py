"""Initial students: how a model of the student's size becomes block-causal, and perhaps few-step.

Each file of this package declares methods in a `METHODS` of its own; to add one, write such a file.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules

from infra.settings import Invalid, at_least, share
from model.initialization.method import Method
from model.rollout_plan import RolloutConfig
from model.sampler import ode_grid


def declared() -> dict[str, Method]:
    """The methods that the files of this package declare, by name."""
    modules = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
    return {name: method for module in modules for name, method in vars(module).get("METHODS", {}).items()}


METHODS = declared()


@dataclass(frozen=True)
class MethodConfig:
    """What an initial student learns by."""

    method: str = "ode"
    """Regression on stored ODE pairs of a bidirectional teacher (`ode`) or of a causal one (`causal_ode`);
    `causal_consistency`: consistency distillation of a causal teacher, without stored pairs; or flow matching
    on data under `teacher_forcing` or `diffusion_forcing`, which makes a causal many-step model, such as
    those two need for a teacher."""
    ode_steps: int = 24
    """Euler steps along the teacher's ODE, and of a many-step model when it generates."""
    guidance: float = 2.0
    """Classifier-free guidance along the ODE, in the form cond + guidance · (cond − uncond); a many-step
    model generates with it."""
    dropout: float = 0.1
    """Share of prompts dropped where a many-step model learns from data, for classifier-free guidance."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise Invalid("method", f"is {self.method!r}; use one of {', '.join(METHODS)}.")
        at_least(self, 1, "ode_steps")
        at_least(self, -1, "guidance")
        share(self, "dropout")

    @property
    def chosen(self) -> Method:
        return METHODS[self.method]

    def generates(self, rollout: RolloutConfig) -> tuple[RolloutConfig, float]:
        """How the finished model generates, where its student will by `rollout`, and with which guidance."""
        if not self.chosen.many_step:
            return rollout, 0.0
        steps = tuple(ode_grid(rollout.every_step, self.ode_steps)[:-1])
        many = replace(rollout, steps=steps, first_steps=None, sampler="ode", context_noise="none")
        return many, self.guidance
