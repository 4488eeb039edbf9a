"""What rollouts ask of a client, so that those of both SDKs do: the constructors, and `sample`.

`twinkle_client.types` and `tinker.types` have classes of the same names that are made in the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Types(Protocol):
    """A module of a client's types."""

    ModelInput: Any
    Datum: Any
    TensorData: Any
    SamplingParams: Any


class Result(Protocol):
    """Something to wait for: a `Pending`, or a future of Tinker's."""

    def result(self) -> Any: ...


class Sampler(Protocol):
    """The part of a sampling client that rollouts use."""

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Result: ...


class Scorer(Protocol):
    """The part of a sampling client that scoring uses."""

    def compute_logprobs(self, prompt: Any) -> Result: ...


def make_datum(types: Types, tokens: Sequence[int], inputs: Mapping[str, Any]) -> Any:
    """A datum that reads `tokens`, int [T], with arrays of the same length as its inputs."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
    )
