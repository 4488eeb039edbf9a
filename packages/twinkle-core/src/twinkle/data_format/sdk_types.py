"""Values for the clients of both SDKs.

`twinkle_client.types` and `tinker.types` have classes of the same names, which are made in the same way.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Types(Protocol):
    """A module of a client's types."""

    ModelInput: Any
    Datum: Any
    TensorData: Any
    SamplingParams: Any


def make_datum(types: Types, tokens: npt.ArrayLike, inputs: Mapping[str, npt.NDArray[Any]]) -> Any:
    """A datum that reads `tokens`, int [T], with `inputs` for its loss, a row for each token."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(np.asarray(tokens).tolist()),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
    )
