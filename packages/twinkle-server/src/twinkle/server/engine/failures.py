"""What the client of a failed job gets: the text of an error meant for users, or an id to look up in the log."""

import logging
import uuid

from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.messages import Failure
from twinkle.server.store import retry

log = logging.getLogger("twinkle.engine")

ENDED_TWICE = (
    "the process that held the model ended or hung while it computed this request, and did so again when the request "
    "was tried once more: don't send it again as it is; the server's log has what is known of the cause"
)
NOT_BACK = (
    "the process that held the model ended or hung, and could not be restarted; this request was not computed: the "
    "server's log has the cause"
)
NOT_REPEATED = (
    "the state of this run is lost: the process that held the model ended or hung, and what the run had computed could "
    "not be computed again; begin a new run from its last checkpoint"
)


def to_failure(error: Exception, doing: str) -> Failure:
    """The outcome for `error`.

    Args:
        doing: the job, in words, for the log.
    """
    if isinstance(error, TwinkleError):
        return Failure(error=error.message, category=error.category)
    if retry.is_transient(error):
        return Failure(error=retry.unavailable(error).message, category="server")
    # By name, since this layer doesn't import torch; CUDA's and the allocator's errors have the same one. (A pass that
    # can't fit because of its own rows is refused by the backend.)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        log.warning("%s ran out of memory: %s", doing, error)
        return Failure(
            error="the server's memory ran out on this request, and nothing was changed; send it again, or fewer or "
            "shorter sequences in one request",
            category="server",
        )
    error_id = uuid.uuid4().hex[:12]
    log.error("%s failed, error id %s", doing, error_id, exc_info=error)
    return Failure(
        error=f"the server failed on this request, and nothing was changed; its log has the cause under error id "
        f"{error_id}",
        category="server",
    )
