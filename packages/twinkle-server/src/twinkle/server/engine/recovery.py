"""Restarts a lost worker.

Every run that was on it is then evicted: its snapshot is loaded when it is needed, and what was computed since then is
computed again in the same calls. So no client notices.
"""

from __future__ import annotations

import logging
import time

from twinkle.protocol.errors import ServerFault
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import WorkerLost, WorkerPort

log = logging.getLogger("twinkle.engine")

# How many attempts, if the restarted worker is lost at once.
_ATTEMPTS = 3


async def recover(
    loss: WorkerLost, worker: WorkerPort, residency: Residency, sampler_adapters: SamplerAdapters
) -> None:
    """
    Raises:
        Exception: if the worker could not be restarted, or can't compute.
    """
    began = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        log.warning("The model was lost (%s); its processes are restarted. Requests wait.", loss.reason)
        try:
            await worker.restart()
            residency.worker_lost()
            sampler_adapters.worker_restarted()
            await warm_up(worker)
            break
        except WorkerLost as again:
            if attempt == _ATTEMPTS:
                raise ServerFault(f"lost at each of {_ATTEMPTS} attempts: {again.reason}") from again
            loss = again
    log.warning("The model is back after %.0f s.", time.monotonic() - began)
