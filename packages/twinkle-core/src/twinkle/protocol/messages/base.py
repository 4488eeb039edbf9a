"""Types of fields that several messages share."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

Metadata: TypeAlias = dict[str, Any]

# What fits into a database's integer.
_LARGEST = 2**63 - 1
Number: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
"""How a client counts its runs, sampling sessions, losses and samples; part of their ids."""
Offset: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
Ttl: TypeAlias = Annotated[int, Field(ge=1, le=100 * 365 * 86_400)]
"""Seconds, at most a hundred years: a later date can't be written."""

AccessScope: TypeAlias = Literal["owned", "accessible"]
"""One's own, or also what others have published."""
