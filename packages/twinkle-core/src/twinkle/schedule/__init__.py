"""Learning rates as plain functions of the step: `optim_step(learning_rate=cosine(step, total_steps=100, peak=1e-4))`.

A schedule keeps no state, so a loop that is resumed at a step goes on with that step's learning rate.
"""

from twinkle.schedule.schedules import constant, cosine, linear

__all__ = ["constant", "cosine", "linear"]
