"""Ends the Tinker SDK's sessions that a group of tests left open, when the group has ended.

The group's server is gone by then or soon. The SDK would send heartbeats to it from a thread for as long as the process
lives, and log its failures into the tests that follow.
"""

from __future__ import annotations

import gc
import sys

import pytest
from side_by_side import group_of


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or group_of(item.nodeid) != group_of(nextitem.nodeid):
        end_sessions()


def end_sessions() -> None:
    """Of all the SDK's clients in this process; they can't be used any more."""
    module = sys.modules.get("tinker.lib.internal_client_holder")
    if module is None:
        return
    for holder in [one for one in gc.get_objects() if type(one) is module.InternalClientHolder]:
        holder.close()
