"""Clients in forked processes: threads, connections and sequence ids stay with the parent.

A forked process inherits memory but no threads: a client that waits for its thread would wait forever, and one that
continues the parent's sequence ids would receive the results of the parent's requests.
"""

import os
import secrets
import weakref
from typing import Protocol

# Sequence ids per client of a sampler; a client in another process begins at a multiple of this (as in Tinker's SDK).
_NUMBERS = 1_000_000_000


class Forkable(Protocol):
    """Something that must reset itself in a forked process."""

    def after_fork(self) -> None:
        """Called in the child. Must not wait for locks, which the parent's threads may have held."""
        ...


_living: "weakref.WeakSet[Forkable]" = weakref.WeakSet()


def reset_when_forked(living: Forkable) -> None:
    """Have `after_fork` called in each process that is forked while `living` is in use."""
    _living.add(living)


def first_number_elsewhere() -> int:
    """The first sequence id of a sampling client's copy, so that no two clients of a sampler use the same ids."""
    return (1 + secrets.randbelow(_NUMBERS)) * _NUMBERS


def _after_fork() -> None:
    for living in list(_living):
        living.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
