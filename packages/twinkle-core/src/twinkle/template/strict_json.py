"""Strict JSON: NaN, infinities and lone surrogates, which Python's parser accepts, are errors."""

import json
import math
from typing import Final, NoReturn


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)


def decoded(text: str) -> object:
    """The value of JSON text; None if it is invalid."""
    try:
        value: object = DECODER.decode(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
