"""Learning rates as plain functions of the step: `optim_step(learning_rate=cosine(step, total_steps=100, peak=1e-4))`.

Schedules have no state, so a loop resumed at a step uses that step's learning rate.
"""

from twinkle.schedule.schedules import constant, cosine, linear

__all__ = ["constant", "cosine", "linear"]
