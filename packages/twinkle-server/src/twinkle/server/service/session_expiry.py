"""Ends sessions: those that are finished, and those whose clients have vanished.

A session whose client has vanished costs no computation: what was accepted on its runs is done, and its samples are
paused. After `limits.max_session_idle_seconds` its runs are saved as checkpoints and ended, which frees their memory.
"""

from __future__ import annotations

import logging

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unavailable
from twinkle.server.scheduling.records import as_computed
from twinkle.server.scheduling.runs import Run
from twinkle.server.service.parts import Parts
from twinkle.server.store import tables

# Paused samples fail after this long a silence of their client.
_GIVE_UP_SECONDS = 900.0

log = logging.getLogger("twinkle.server")


async def end_session(parts: Parts, session_id: str) -> None:
    """Unload a session's runs, after everything they have queued, and forget it."""
    for run in _runs_of(parts, session_id):
        await _unload(parts, run)
    _forget(parts, session_id)


def pause_gone(parts: Parts) -> None:
    """Pause the samples of clients that are gone, since nobody waits for them; resume those of clients that are back.

    What was accepted stays promised. (Passes and steps are done anyway: they make up the run's state.)
    """
    parts.leases.tick()
    for session_id in parts.samples.sessions():
        if parts.leases.is_gone(session_id):
            parts.samples.pause(session_id)
        else:
            parts.samples.resume(session_id)
        if parts.leases.silent_for(session_id) >= _GIVE_UP_SECONDS:
            parts.samples.give_up(session_id)


async def release_vanished(parts: Parts) -> None:
    """Save and unload the runs of sessions whose leases expired long ago."""
    idle_seconds = parts.limits.max_session_idle_seconds
    if idle_seconds is None:
        return
    for run in parts.live:  # restored from an earlier process: idle from now on
        parts.leases.add(run.session_id)
    for session_id in parts.leases.sessions() - parts.leases.active(idle_seconds):
        await _release(parts, session_id, idle_seconds)


async def _release(parts: Parts, session_id: str, idle_seconds: float) -> None:
    parts.samples.cancel_all(session_id)
    for run in _runs_of(parts, session_id):
        if session_id in parts.leases.active(idle_seconds):
            return  # its client is back
        saved = await _save(parts, run)
        if isinstance(saved, m.Failure):  # it stays as it is, and is tried again
            log.warning(
                "run %s of a client that has vanished could not be saved: %s", run.run_id, saved.error
            )
            return
        await _unload(parts, run)
        log.info("run %s of a client that has vanished is kept as %s", run.run_id, tables.RELEASED_NAME)
    _forget(parts, session_id)


def _runs_of(parts: Parts, session_id: str) -> list[Run]:
    return [run for run in parts.live if run.session_id == session_id]


async def _save(parts: Parts, run: Run) -> m.Result | m.Failure:
    request = m.SaveWeightsRequest(model_id=run.run_id, seq_id=0, path=tables.RELEASED_NAME, overwrite=True)
    try:
        return await _do_last(parts, run, request)
    except Unavailable as error:
        return m.Failure(error=error.message, category=error.category)


async def _unload(parts: Parts, run: Run) -> None:
    await _do_last(parts, run, m.UnloadModelRequest(model_id=run.run_id))
    await parts.checkpoints.drop_unnamed(run)


async def _do_last(
    parts: Parts, run: Run, request: m.SaveWeightsRequest | m.UnloadModelRequest
) -> m.Result | m.Failure:
    promise = parts.live.enqueue_last(run, request)
    while (outcome := await parts.futures.wait(run.tenant, promise.request_id, 60.0)) is None:
        pass
    return as_computed(outcome)


def _forget(parts: Parts, session_id: str) -> None:
    for sampler_id in parts.samplers.forget(session_id):
        parts.completions.forget(sampler_id)
    parts.losses.forget(session_id)
    parts.leases.forget(session_id)
    parts.live.forget_lost(session_id)
