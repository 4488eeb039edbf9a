"""How long prompts wait, while others decode, so that one pass prefills several of them."""

from __future__ import annotations

# A prompt waits at most this many decode steps, and at most this share of those that it will take itself. Prefilling it
# alone takes about as long as one step.
MAX_STEPS = 8
SHARE = 1 / 8


class PrefillDelay:
    """Counts decode steps."""

    def __init__(self, enough_tokens: int) -> None:
        """
        Args:
            enough_tokens: prompts with this many tokens fill a pass; waiting for more gains nothing.
        """
        self._enough_tokens = enough_tokens
        self._steps = 0
        self._due: int | None = (
            None  # the step from which waiting prompts are prefilled; None: there are none
        )
        self._tokens = 0

    @property
    def has_expired(self) -> bool:
        return self._due is not None and (self._steps >= self._due or self._tokens >= self._enough_tokens)

    def added(self, prompt_tokens: int, max_tokens: int) -> None:
        due = self._steps + min(MAX_STEPS, int(SHARE * max_tokens))
        self._due = due if self._due is None else min(self._due, due)
        self._tokens += prompt_tokens

    def stepped(self) -> None:
        self._steps += 1

    def admitted(self, all_of_them: bool) -> None:
        """Some of the waiting prompts are prefilled; the rest follow as soon as there is room."""
        self._due = None if all_of_them else self._steps
        self._tokens = 0
