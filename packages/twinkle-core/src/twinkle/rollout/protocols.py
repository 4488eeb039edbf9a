"""What rollouts ask of a sampling client, so that those of both SDKs do."""

from typing import Any, Protocol


class Result(Protocol):
    """Something to wait for: a `Pending`, or a future of Tinker's."""

    def result(self) -> Any: ...


class Sampler(Protocol):
    """The part of a sampling client that rollouts use."""

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Result: ...


class Scorer(Protocol):
    """The part of a sampling client that scoring uses."""

    def compute_logprobs(self, prompt: Any) -> Result: ...
