"""Custom losses that clients have traced and uploaded, kept with their sessions."""

from __future__ import annotations

import asyncio

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest
from twinkle.server.backends.lora.losses import custom_check
from twinkle.server.backends.protocol import CUSTOM_LOSS, CustomLoss, LossSpecs
from twinkle.server.store import tables
from twinkle.server.store.database import Database


class CustomLosses:
    """The stored losses, with those in use cached. Single-threaded: called on one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, CustomLoss] = {}  # they never change

    async def create(self, tenant: str, request: m.CreateCustomLossRequest, loss_fns: LossSpecs) -> str:
        """Check and store a loss; a duplicate request gets the first one's id.

        Raises:
            InvalidRequest: if the backend runs no custom losses, or not this one.
            Conflict: if the number was used for another loss.
        """
        if CUSTOM_LOSS not in loss_fns:
            raise InvalidRequest(
                "create_custom_loss: this server's training backend runs no custom losses; pass the function itself "
                "to forward_backward_custom, which runs it at the client"
            )
        custom_check.check(request.inputs, request.graph)
        loss_id = f"{_prefix(request.session_id)}{request.custom_loss_seq_id}"
        body = request.model_dump_json()
        first = await asyncio.to_thread(self._database.custom_loss, tenant, loss_id)
        if first is None:
            row = tables.CustomLoss(id=loss_id, tenant=tenant, session_id=request.session_id, body=body)
            await asyncio.to_thread(self._database.put, row)
        elif first.body != body:
            raise Conflict(
                f"custom_loss_seq_id: {request.custom_loss_seq_id} was used before in this session, for another loss: "
                "a request that is sent again must be the same, and another loss needs the next number"
            )
        return loss_id

    async def load(self, tenant: str, request: m.ForwardBackwardRequest) -> None:
        """Cache the loss that a pass with a custom loss names, if it exists."""
        loss_id = request.loss_fn_config.get("loss_id")
        if not isinstance(loss_id, str) or loss_id in self._known:
            return
        row = await asyncio.to_thread(self._database.custom_loss, tenant, loss_id)
        if row is not None:
            made = m.CreateCustomLossRequest.model_validate_json(row.body)
            self._known[loss_id] = CustomLoss(loss_id, made.name, tuple(made.inputs), made.graph)

    def of(self, session_id: str, request: m.ForwardBackwardRequest) -> CustomLoss:
        """The loss that a pass with a custom loss names, once it is loaded.

        Raises:
            InvalidRequest: if there is no such loss in the session.
        """
        loss_id = str(request.loss_fn_config.get("loss_id", ""))
        found = self._known.get(loss_id) if loss_id.startswith(_prefix(session_id)) else None
        if found is None:
            raise InvalidRequest(
                f"loss_fn_config.loss_id: {loss_id[:200]!r} is no custom loss of this session; make one with "
                "create_custom_loss"
            )
        return found

    def forget(self, session_id: str) -> None:
        """The session is over."""
        for loss_id in [loss_id for loss_id in self._known if loss_id.startswith(_prefix(session_id))]:
            del self._known[loss_id]


def _prefix(session_id: str) -> str:
    return f"{session_id}:loss:"
