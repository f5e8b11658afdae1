"""Learning rate schedules: pure functions of the step and of the progress through the run, warm-up first.

The horizon is the Trainer's: progress is the largest of the fractions of max_steps, max_epochs, max_tokens and
max_time that are used up, so a run that is cut by its time limit has finished its decay by then.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then the shape of a subclass, as a factor on the optimizer's learning rate.

    Args:
        warmup_steps: Optimizer steps of linear warm-up; None takes warmup_fraction.
        warmup_fraction: The same as a fraction of the run, 0 to 1.
    """

    warmup_steps: int | None = None
    warmup_fraction: float = 0.02

    def __post_init__(self):
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction}; pass 0 <= fraction < 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}; pass 0 or more")

    def factor(self, step: int, progress: float) -> float:
        """For the step numbered `step` from 0; `progress` (0 to 1) of the run is done in the middle of it."""
        if self.warmup_steps is not None:
            warm = (step + 1) / (self.warmup_steps + 1)
        else:
            warm = progress / self.warmup_fraction if self.warmup_fraction else 1.0
        return min(1.0, warm) * self.shape(step, progress)

    def shape(self, step: int, progress: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The learning rate stays."""


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Straight down to `final`.

    Args:
        final: Factor at the end of the run.
    """

    final: float = 0.0

    def shape(self, step: int, progress: float) -> float:
        return 1 + (self.final - 1) * progress


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine down to `final`; https://arxiv.org/abs/1608.03983 without restarts.

    Args:
        final: Factor at the end of the run.
    """

    final: float = 0.0

    def shape(self, step: int, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Multiplied by `gamma` each `every` steps.

    Args:
        every: Optimizer steps between two drops.
        gamma: Factor of a drop.
    """

    every: int = 1000
    gamma: float = 0.5

    def shape(self, step: int, progress: float) -> float:
        return self.gamma ** (step // self.every)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Multiplied by `gamma` at each step.

    Args:
        gamma: Factor of a step.
    """

    gamma: float = 0.999

    def shape(self, step: int, progress: float) -> float:
        return self.gamma**step


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Schedule):
    """1 / √step after the warm-up, as in section 5.3 of https://arxiv.org/abs/1706.03762.

    Args:
        scale_steps: Step up to which the factor is 1; None takes warmup_steps, or 1,000 without it.
    """

    scale_steps: int | None = None

    def shape(self, step: int, progress: float) -> float:
        scale = self.scale_steps or self.warmup_steps or 1000
        return min(1.0, math.sqrt(scale / (step + 1)))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Constant, then linear to `final` over the last `decay_fraction` of the run; https://arxiv.org/abs/2405.18392.

    Args:
        decay_fraction: Part of the run that decays, 0 to 1.
        final: Factor at the end of the run.
    """

    decay_fraction: float = 0.6
    final: float = 0.0

    def shape(self, step: int, progress: float) -> float:
        left = 1 - progress
        return 1.0 if left >= self.decay_fraction else self.final + (1 - self.final) * left / self.decay_fraction
