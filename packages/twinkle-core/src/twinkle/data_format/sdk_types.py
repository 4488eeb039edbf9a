"""Values of both SDKs.

`twinkle_client.types` and `tinker.types` have classes of the same names, with the same constructors.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Types(Protocol):
    """A client's module of types."""

    ModelInput: Any
    Datum: Any
    TensorData: Any
    SamplingParams: Any


def make_datum(types: Types, tokens: npt.ArrayLike, inputs: Mapping[str, npt.NDArray[Any]]) -> Any:
    """A datum with `tokens`, int [T], as model input, and loss inputs with one row per token."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(np.asarray(tokens).tolist()),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
    )
