"""What a client is in a process that was forked: its threads, its connections and its numbers stay with the parent.

A forked process shares memory, and not threads: a client that waits for its own would wait for ever, and one that goes
on counting where the parent was would be given the answers to the parent's requests.
"""

import os
import secrets
import weakref
from typing import Protocol

# So many numbers of a sampler are one client's; a client elsewhere begins at a multiple of it (as Tinker's SDK does).
_NUMBERS = 1_000_000_000


class Forkable(Protocol):
    """What has to begin anew in a forked process."""

    def after_fork(self) -> None:
        """Called in the child; whatever locks the parent's threads held must not be waited for."""
        ...


_living: "weakref.WeakSet[Forkable]" = weakref.WeakSet()


def begin_anew_when_forked(living: Forkable) -> None:
    """Have `after_fork` called in each process that is forked while `living` is in use."""
    _living.add(living)


def first_number_elsewhere() -> int:
    """Where a copy of a sampling client begins to count, so that no two of one sampler count alike."""
    return (1 + secrets.randbelow(_NUMBERS)) * _NUMBERS


def _after_fork() -> None:
    for living in list(_living):
        living.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
