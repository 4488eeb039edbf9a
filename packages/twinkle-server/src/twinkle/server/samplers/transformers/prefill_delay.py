"""How long prompts wait, while others generate, so that several are read in one pass."""

from __future__ import annotations

# A prompt waits at most so many steps, and at most this share of those that it will take itself. To read it alone takes
# about as long as a step of all others.
MOST_STEPS = 8
SHARE = 1 / 8


class Patience:
    """Counts steps. Not thread-safe."""

    def __init__(self, enough_tokens: int) -> None:
        """
        Args:
            enough_tokens: of prompts that wait; with so many a pass is full, and nothing is gained by more.
        """
        self._enough_tokens = enough_tokens
        self._steps = 0
        self._due: int | None = None  # the step from which those that wait are read; None if nobody waits
        self._tokens = 0

    @property
    def is_over(self) -> bool:
        return self._due is not None and (self._steps >= self._due or self._tokens >= self._enough_tokens)

    def arrived(self, prompt_tokens: int, max_tokens: int) -> None:
        due = self._steps + min(MOST_STEPS, int(SHARE * max_tokens))
        self._due = due if self._due is None else min(self._due, due)
        self._tokens += prompt_tokens

    def stepped(self) -> None:
        self._steps += 1

    def admitted(self, all_of_them: bool) -> None:
        """Some who waited are read; who is left over comes as soon as there is room."""
        self._due = None if all_of_them else self._steps
        self._tokens = 0
