"""Users' numbers as float64 arrays of the expected shape, or an error that says what is wrong.

Nothing is computed here.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from twinkle.protocol.errors import InvalidRequest

Float64Array: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


def finite_array(name: str, values: object, shape: str) -> Float64Array:
    """`values` (a list, numpy array or CPU tensor) as float64.

    Args:
        name: what messages call it.
        shape: the expected shape, such as "[T]" or "[P, G]": one name for each dimension.

    Raises:
        InvalidRequest: if it is None, ragged, not numeric, not finite, or has another number of dimensions.
    """
    if values is None:
        raise InvalidRequest(f"{name}: None; expected numbers {shape}")
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {_ragged(values)}; expected numbers {shape}") from error
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.float64)
    if array.dtype.kind not in "iubf":
        raise InvalidRequest(f"{name}: {_no_number(name, array)}; expected numbers {shape}")
    if array.ndim != shape.count(",") + 1:
        raise InvalidRequest(f"{name}: an array of shape {list(array.shape)}; expected {shape}")
    numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        raise InvalidRequest(f"{_at(name, index)}: {numbers[index]}; only finite numbers are allowed")
    return numbers


def as_mask(name: str, values: object, shape: str) -> BoolArray:
    """True and False, or 1 and 0, as booleans.

    Raises:
        InvalidRequest: as `finite_array`, or naming an entry that is neither.
    """
    numbers = finite_array(name, values, shape)
    odd = np.argwhere((numbers != 0) & (numbers != 1))
    if len(odd):
        index = tuple(int(i) for i in odd[0])
        raise InvalidRequest(
            f"{_at(name, index)}: {numbers[index]:g}; a mask holds True and False, or 1 and 0"
        )
    return numbers == 1


def whole_number(name: str, value: object, minimum: int) -> int:
    """
    Raises:
        InvalidRequest: if it is not a whole number, or below the minimum.
    """
    number = (
        int(cast(int, value)) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None
    )
    if number is None or number < minimum:
        raise InvalidRequest(f"{name}: {value!r}; allowed are whole numbers from {minimum}")
    return number


def number_between(name: str, value: float, low: float, high: float = math.inf) -> float:
    """
    Raises:
        InvalidRequest: if it is not finite, or outside [low, high].
    """
    if not (low <= value <= high and math.isfinite(value)):
        allowed = f"finite numbers from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        raise InvalidRequest(f"{name}: {value!r}; allowed are {allowed}")
    return float(value)


def _at(name: str, index: tuple[int, ...]) -> str:
    return name + "".join(f"[{i}]" for i in index)


def _ragged(values: object) -> str:
    if isinstance(values, Sequence):
        lengths = [
            len(cast(Sequence[object], row)) if isinstance(row, Sequence | np.ndarray) else None
            for row in cast(Sequence[object], values)
        ]
        odd = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
        if odd and lengths[0] is not None and lengths[odd] is not None:
            return f"row {odd} holds {lengths[odd]} entries and row 0 holds {lengths[0]}"
    return "not a rectangular array"


def _no_number(name: str, array: npt.NDArray[Any]) -> str:
    """What is wrong with an array of objects or strings: most often a None among the numbers."""
    if array.dtype.kind == "O":
        for index in np.ndindex(array.shape):
            if not isinstance(array[index], int | float | np.number):
                return f"{_at(name, index)} is {type(array[index]).__name__}"
    return f"values of type {array.dtype}"
