"""What happens when a process of the model has ended: it is started anew, and what was lost is computed again.

Every run that was on it is its copy then, and comes back when it is needed; what had been computed since the copies is
computed again in the same calls. So nobody has to know.
"""

from __future__ import annotations

import logging
import time

from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import WorkerLost, WorkerPort

log = logging.getLogger("twinkle.engine")

# A new process that ends at once is started anew in turn, so often.
_ATTEMPTS = 3


class Recovery:
    """Brings a lost worker back."""

    def __init__(self, worker: WorkerPort, residency: Residency, sampler_adapters: SamplerAdapters) -> None:
        self._worker = worker
        self._residency = residency
        self._sampler_adapters = sampler_adapters

    async def recover(self, loss: WorkerLost) -> None:
        """
        Raises:
            Exception: if the worker could not be started anew, or not be brought to work.
        """
        began = time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            log.warning("A process of the model ended (%s): starting it anew. Requests wait.", loss.reason)
            try:
                await self._worker.restart()
                self._residency.worker_lost()
                self._sampler_adapters.forget_all()
                await warm_up(self._worker)
                break
            except WorkerLost as again:
                if attempt == _ATTEMPTS:
                    raise
                loss = again
        log.warning("The model is back after %.0f s.", time.monotonic() - began)
