"""What messages have in common: the base of all queries, and the types of shared fields."""

from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast

from pydantic import Field

from twinkle.protocol.types import Value

Metadata: TypeAlias = dict[str, Any]

# The largest integer that a database column holds.
_LARGEST = 2**63 - 1
Number: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
"""How a client counts its runs, sampling sessions, losses and samples; part of their ids."""
Offset: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
Ttl: TypeAlias = Annotated[int, Field(ge=1, le=100 * 365 * 86_400)]
"""Seconds, at most a hundred years: a later date can't be represented."""

AccessScope: TypeAlias = Literal["owned", "accessible"]
"""Only the caller's own, or also what others have published."""

Reply: TypeAlias = Value
"""What a query is answered with."""
ReplyT = TypeVar("ReplyT", bound=Value, covariant=True)


class Query(Value, Generic[ReplyT]):
    """A request that is answered at once (or within the time that the request itself sets).

    A subclass names its reply and its endpoint: `class GetRun(Query[Run], method="GET", path="/runs/{run_id}")`. Fields
    that the path names travel there, the rest as the JSON body of a POST or PUT, or else in the query string;
    `idempotency_key` travels as the header X-Idempotency-Key.

    Attributes:
        method: the HTTP method.
        path: below `endpoints.PREFIX`.
        with_endpoints: all subclasses that have an endpoint, in order of definition.
    """

    method: ClassVar[str]
    path: ClassVar[str]
    with_endpoints: ClassVar[list[type["Query[Any]"]]] = []

    def __init_subclass__(
        cls, method: Literal["GET", "POST", "PUT", "DELETE"] | None = None, path: str = "", **more: Any
    ) -> None:
        super().__init_subclass__(**more)
        if method is not None:
            cls.method, cls.path = method, path
            cls.with_endpoints.append(cls)

    @classmethod
    def reply_type(cls) -> type[ReplyT]:
        """The `R` of `Query[R]`."""
        bases = (base.__pydantic_generic_metadata__ for base in cls.__mro__ if issubclass(base, Query))
        return cast(type[ReplyT], next(base["args"][0] for base in bases if base["args"]))


class Acknowledged(Value):
    """Service to client: done, with nothing to report."""
