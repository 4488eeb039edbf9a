"""The reward for a right mathematical answer."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinkle.protocol.errors import InvalidRequest
from twinkle.reward import math_processes

logger = logging.getLogger(__name__)

# What GSM8K writes before the answer, behind its solution.
_GSM8K_ANSWER = "####"


@dataclass(frozen=True)
class MathReward:
    r"""1.0 if a completion's final answer equals the true one mathematically, else 0.0.

    The library `math_verify` (extra `math`) finds and compares answers: fractions, decimals, thousands separators,
    percentages (50% equals 0.5, and 50 too), intervals, sets, equations. Decimals are compared to six places, and to
    six digits where the true answer is smaller than 1 (a fraction or root: than 0.001). The last `\boxed{...}` is the
    final answer (several close to each other are a set); without one, what follows "the final answer is" or "answer:";
    else the last formula or number. Only what comes after `</think>` counts, and a completion cut off while it was
    thinking has no answer.

    Comparing runs in processes of its own, which start with the first call (about a second) and are ended when an
    answer takes too long, such as a tower of powers: that counts as wrong. So it works in any thread, several at once
    too.

    Attributes:
        answer_key: the row's column with the true answer: text (LaTeX with or without delimiters; where there is a
            `####`, as in GSM8K, what follows the last one) or a number.
        timeout_seconds: how long one comparison may take.

    Raises:
        InvalidRequest: if `timeout_seconds` is not positive.
    """

    answer_key: str = "answer"
    timeout_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise InvalidRequest(
                f"timeout_seconds: {self.timeout_seconds!r}; allowed are finite numbers above 0"
            )

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """
        Raises:
            InvalidRequest: if the row has no such answer, or `math_verify` is not installed.
        """
        truth = self._truth(row)
        answer = completion.rpartition("</think>")[2].partition("<think>")[0]
        if not answer.strip():
            return 0.0
        verdict = math_processes.compare(answer, truth, self.timeout_seconds)
        if verdict == "no truth":
            raise InvalidRequest(
                f"{self.answer_key}: no mathematical answer in {truth[:60]!r}; it must hold the answer alone, or in "
                r"\boxed{...}, or after ####"
            )
        if verdict == "unfinished":
            logger.warning(
                "not comparable to %r within %g s, counted as wrong: %r",
                truth[:60],
                self.timeout_seconds,
                answer[-60:],
            )
        return float(verdict == "equal")

    def _truth(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.answer_key)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            columns = ", ".join(map(str, row)) or "none"
            raise InvalidRequest(
                f"{self.answer_key}: expected the true answer as text or number, got {type(value).__name__}; the "
                f"columns are {columns}: name the right one with answer_key"
            )
        return str(value).rpartition(_GSM8K_ANSWER)[2].strip()
