"""The parts of a sampling client that rollouts use, which both SDKs have."""

from typing import Any, Protocol


class Result(Protocol):
    """A pending result: a `Pending`, or Tinker's future."""

    def result(self) -> Any: ...


class Sampler(Protocol):
    """The part of a sampling client that rollouts use."""

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Result: ...


class Scorer(Protocol):
    """The part of a sampling client that scoring uses."""

    def compute_logprobs(self, prompt: Any) -> Result: ...
