"""The contract suite: what every training backend must do, as functions that raise `AssertionError` where it doesn't.

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(lambda: MyBackend(config))

Each check makes backends of its own by the factory, in float32; a factory may share what is costly (the base model).
Expected values are closed forms, or the same thing done in another way. A check is a public function of `adapters`,
`passes`, `optimizer` or `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from twinkle.server.backends.contract import adapters, optimizer, passes, state
from twinkle.server.backends.contract.parts import Factory as Factory

Check: TypeAlias = Callable[[Factory], None]

# The functions that are defined there, in their order.
CHECKS: tuple[Check, ...] = tuple(
    found
    for module in (adapters, passes, optimizer, state)
    for found in vars(module).values()
    if getattr(found, "__module__", None) == module.__name__
)
