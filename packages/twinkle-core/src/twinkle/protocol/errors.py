"""The errors, each with the HTTP status under which it travels.

    TwinkleError
    ├── InvalidRequest        400  the caller's mistake; the message names the field and what is allowed
    │   └── TokenError, ...        (subclasses live with the code that raises them)
    ├── Unauthorized          401  no or unknown API key
    ├── QuotaReached          403  a quota is used up: something must be deleted first, waiting doesn't help
    ├── NotFound              404  doesn't exist, or belongs to another tenant: never distinguished
    ├── Conflict              409  a sequence id was reused for a different request
    ├── Gone                  410  existed, and has ended for good
    ├── TooLarge              413  a body or a sequence over a limit
    ├── LimitReached          429  a limit that waiting helps with; carries `retry_after` seconds
    ├── Unavailable           503  temporarily unable; carries `retry_after` seconds
    ├── ServerFault           500  the server's mistake; the message holds an error id, never a traceback
    └── ConnectionFailed       -   client side only: the server could not be reached

There is no 402: the Tinker SDK pauses up to an hour on it. The SDK retries a 409, so it means only a client's mistake
with its own sequence ids, which the SDK doesn't make. There is no 501: a missing capability is a 400 that names it,
since the SDK retries every 5xx. An operation that fails after it was accepted is a `RequestFailed`; it travels inside a
200 as `{error, category}`.
"""

import re
from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class TwinkleError(Exception):
    """Base of all errors whose message is meant for people.

    Attributes:
        status: the HTTP status under which the error travels.
        category: who can fix it.
    """

    status: ClassVar[int] = 500
    category: Category = "server"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(TwinkleError):
    """The request is invalid; sending it again doesn't help."""

    status = 400
    category: Category = "user"


class Unauthorized(TwinkleError):
    """No API key, or an unknown one."""

    status = 401
    category: Category = "user"


class QuotaReached(TwinkleError):
    """A quota of the tenant or the server is used up; something must be deleted first."""

    status = 403
    category: Category = "user"


class NotFound(TwinkleError):
    """No such thing, as far as this tenant can see."""

    status = 404
    category: Category = "user"


class Conflict(TwinkleError):
    """The sequence id was used before, for a different request."""

    status = 409
    category: Category = "user"


class Gone(TwinkleError):
    """It existed, and has ended for good."""

    status = 410
    category: Category = "user"


class TooLarge(TwinkleError):
    """A body over one of the server's limits."""

    status = 413
    category: Category = "user"


class TryLater(TwinkleError):
    """The request can't be taken now; sent again later, it may be.

    Attributes:
        retry_after: seconds until a retry makes sense.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LimitReached(TryLater):
    """A limit that waiting helps with."""

    status = 429
    category: Category = "user"


class Unavailable(TryLater):
    """The server can't take the request right now, through no fault of the caller."""

    status = 503


class ServerFault(TwinkleError):
    """Something broke on the server."""


class ConnectionFailed(TwinkleError):
    """The server could not be reached, or stopped answering."""


class RequestFailed(TwinkleError):
    """An accepted operation failed, and changed nothing.

    Attributes:
        request_id: the operation's id; None if the failure never left the process.
    """

    status = 200

    def __init__(self, message: str, category: Category = "unknown", request_id: str | None = None) -> None:
        super().__init__(message)
        self.category = category
        self.request_id = request_id


# A path has no letter, colon, dot or other slash before it, as in tinker://RUN/weights/NAME or "and/or".
_PATH = re.compile(r"(?<![\w:/.])(?:file://)?/[^\s'\"<>|:;,()]+")


def words_of(error: BaseException) -> str:
    """An error's message without this machine's paths, which belong in its log and not in a reply."""
    return _PATH.sub("...", getattr(error, "strerror", None) or str(error))


# All but those of a client alone.
_OF_SERVERS = InvalidRequest, Unauthorized, QuotaReached, NotFound, Conflict, Gone, TooLarge, ServerFault
_BY_STATUS: dict[int, type[TwinkleError]] = {
    error.status: error for error in (*_OF_SERVERS, LimitReached, Unavailable)
}


def from_status(status: int, message: str, retry_after: float | None = None) -> TwinkleError:
    """The error of an HTTP reply; unknown 4xx are `InvalidRequest`, unknown 5xx `ServerFault`."""
    kind = _BY_STATUS.get(status, InvalidRequest if 400 <= status < 500 else ServerFault)
    if issubclass(kind, TryLater) and retry_after is not None:
        return kind(message, retry_after)
    return kind(message)
