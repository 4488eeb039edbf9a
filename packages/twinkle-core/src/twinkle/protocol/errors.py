"""What can go wrong, as types that carry how they travel.

    TwinkleError
    ├── InvalidRequest        400  the caller's mistake; the message names the field and what is allowed
    │   └── TokenError, ...        (subclasses live beside what raises them)
    ├── Unauthorized          401  no or unknown API key
    ├── QuotaReached          403  so many are there already that one has to go first; waiting alone doesn't help
    ├── NotFound              404  no such thing, or it belongs to another tenant: the two are never told apart
    ├── Conflict              409  a number was used before, for a request that asks for something else
    ├── Gone                  410  it was there, and has ended for good
    ├── TooLarge              413  a body or a sequence over a limit
    ├── LimitReached          429  a limit that waiting helps with; carries `retry_after` seconds
    ├── Unavailable           503  the server can't take it just now; carries `retry_after` seconds
    ├── ServerFault           500  the server's mistake; the message holds an error id, never a traceback
    └── ConnectionFailed       -   client side only: the server could not be reached

There is no 402: the Tinker SDK waits an hour for it to pass. The SDK tries a 409 again, so it stands for nothing but a
client's mistake with its own numbers, which the SDK doesn't make. There is no 501: a missing capability is a 400 that
names it, since the SDK retries every 5xx. An operation that fails after it was
accepted is a `RequestFailed`: it travels inside a 200 as `{error, category}`.
"""

import re
from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class TwinkleError(Exception):
    """Base of all errors with a message meant for a person.

    Attributes:
        status: the HTTP status under which the error travels.
        category: who can do something about it.
    """

    status: ClassVar[int] = 500
    category: Category = "server"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(TwinkleError):
    """The request can't be done as it stands; sending it again changes nothing."""

    status = 400
    category: Category = "user"


class Unauthorized(TwinkleError):
    """No API key, or one that this server doesn't know."""

    status = 401
    category: Category = "user"


class QuotaReached(TwinkleError):
    """The tenant, or the server, has as many or as much as it may; something has to go first."""

    status = 403
    category: Category = "user"


class NotFound(TwinkleError):
    """No such thing, as far as this tenant may know."""

    status = 404
    category: Category = "user"


class Conflict(TwinkleError):
    """The number that says which request this is was used before, for one that asks for something else."""

    status = 409
    category: Category = "user"


class Gone(TwinkleError):
    """It was there, and has ended for good."""

    status = 410
    category: Category = "user"


class TooLarge(TwinkleError):
    """A body over a limit of the server."""

    status = 413
    category: Category = "user"


class LimitReached(TwinkleError):
    """A limit that waiting helps with.

    Attributes:
        retry_after: seconds after which a new try makes sense.
    """

    status = 429
    category: Category = "user"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(TwinkleError):
    """The server can't take the request just now, through no fault of the caller's.

    Attributes:
        retry_after: seconds after which a new try makes sense.
    """

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerFault(TwinkleError):
    """Something broke on the server's side."""


class ConnectionFailed(TwinkleError):
    """The server could not be reached, or stopped answering."""


class RequestFailed(TwinkleError):
    """An accepted operation that failed; what it would have changed is unchanged.

    Attributes:
        request_id: the operation's id, or None where the failure never left the process.
    """

    status = 200

    def __init__(self, message: str, category: Category = "unknown", request_id: str | None = None) -> None:
        super().__init__(message)
        self.category = category
        self.request_id = request_id


# A path has no letter, colon, dot or other slash before it, as in tinker://RUN/weights/NAME or "and/or".
_PATH = re.compile(r"(?<![\w:/.])(?:file://)?/[^\s'\"<>|:;,()]+")


def words_of(error: BaseException) -> str:
    """What an error says, without paths of this machine: those are for its log, and not for whoever asked."""
    return _PATH.sub("...", getattr(error, "strerror", None) or str(error))


_BY_STATUS: dict[int, type[TwinkleError]] = {
    error.status: error
    for error in (
        InvalidRequest,
        Unauthorized,
        QuotaReached,
        NotFound,
        Conflict,
        Gone,
        TooLarge,
        ServerFault,
    )
}


def from_status(status: int, message: str, retry_after: float | None = None) -> TwinkleError:
    """The error that an HTTP reply stands for; unknown 4xx are `InvalidRequest`, unknown 5xx `ServerFault`."""
    if status == LimitReached.status:
        return LimitReached(message, retry_after if retry_after is not None else 1.0)
    if status == Unavailable.status:
        return Unavailable(message, retry_after if retry_after is not None else 1.0)
    fallback = InvalidRequest if 400 <= status < 500 else ServerFault
    return _BY_STATUS.get(status, fallback)(message)
