"""The learning rate of every step, from its number alone: a run that resumes goes on exactly where it was."""

import math

from protocol.settings import Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Of the update after `step` others; it rises over the warm-up and falls to nothing at `run.steps`."""
    learner = settings.learner
    warmed_up = min(1.0, (step + 1) / learner.warmup_steps) if learner.warmup_steps else 1.0
    progress = (step - learner.warmup_steps) / max(1, settings.run.steps - learner.warmup_steps)
    progress = min(max(progress, 0.0), 1.0)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return learner.learning_rate * warmed_up * decay[learner.schedule]
