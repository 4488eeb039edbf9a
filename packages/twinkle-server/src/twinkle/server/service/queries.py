"""Answers that need nothing but the store and facts about the model."""

from __future__ import annotations

import time
from typing import Any, Literal, cast

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import NotFound
from twinkle.protocol.uris import CheckpointKind
from twinkle.server.backends.protocol import BaseModelInfo
from twinkle.server.scheduling.runs import Run
from twinkle.server.scheduling.threads import TenantThreads
from twinkle.server.service.metadata import iso, texts
from twinkle.server.store import tables
from twinkle.server.store.database import Database

_CHECKPOINT_TYPES: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


# ---------------------------------------------------------------- model and runs


def capabilities(model_name: str, info: BaseModelInfo) -> m.ServerCapabilities:
    return m.ServerCapabilities(
        supported_models=[
            m.SupportedModel(
                model_name=model_name,
                max_context_length=info.max_context_length,
                max_lora_rank=info.max_lora_rank,
                vocab_size=info.vocab_size,
            )
        ]
    )


def run_info(run: Run, info: BaseModelInfo) -> m.GetInfoResponse:
    data = m.ModelData(arch=info.architecture, model_name=run.base_model, tokenizer_id=run.base_model)
    return m.GetInfoResponse(
        model_data=data, model_id=run.run_id, lora_rank=run.spec.rank, model_name=run.base_model
    )


# ---------------------------------------------------------------- checkpoints


def _checkpoint(row: tables.Checkpoint) -> m.Checkpoint:
    return m.Checkpoint(
        checkpoint_id=f"{row.kind}/{row.name}",
        checkpoint_type=_CHECKPOINT_TYPES[cast(CheckpointKind, row.kind)],
        time=iso(row.created_at),
        tinker_path=str(row.uri),
        size_bytes=row.size_bytes,
        public=row.public,
        user_metadata=texts(row.user_metadata),
        expires_at=iso(row.expires_at) if row.expires_at else None,
    )


def _training_runs(database: Database, tenant: str, rows: list[tables.Run]) -> list[m.TrainingRun]:
    newest = {
        (row.run_id, row.kind): row
        for row in database.newest_checkpoints(tenant, [row.id for row in rows], time.time())
    }
    return [
        _training_run(row, newest.get((row.id, "weights")), newest.get((row.id, "sampler_weights")))
        for row in rows
    ]


def _training_run(
    row: tables.Run, weights: tables.Checkpoint | None, sampler_weights: tables.Checkpoint | None
) -> m.TrainingRun:
    return m.TrainingRun(
        training_run_id=row.id,
        base_model=plain_name(row.base_model),
        model_owner=row.tenant,
        lora_rank=row.rank,
        last_request_time=iso(row.last_request_at),
        last_checkpoint=_checkpoint(weights) if weights else None,
        last_sampler_checkpoint=_checkpoint(sampler_weights) if sampler_weights else None,
        user_metadata=texts(row.user_metadata),
    )


# ---------------------------------------------------------------- lists


async def answer(database: Database, threads: TenantThreads, tenant: str, query: m.Query[Any]) -> m.Reply:
    """The queries that read rows and do nothing else."""
    return await threads.run(tenant, lambda: _answer(database, tenant, query))


def _answer(database: Database, tenant: str, query: m.Query[Any]) -> m.Reply:
    now = time.time()
    match query:
        case m.GetSampler():
            sampler = database.sampler(tenant, query.sampler_id)
            if sampler is None:
                raise NotFound(f"sampler_id: no sampler {query.sampler_id[:200]!r}")
            return m.SamplerInfo(
                sampler_id=sampler.id,
                base_model=plain_name(sampler.base_model),
                model_path=sampler.model_path,
            )
        case m.GetTrainingRun():
            run = _run(database, tenant, query.run_id, accessible=query.access_scope == "accessible")
            return _training_runs(database, tenant, [run])[0]
        case m.ListTrainingRuns():
            accessible = query.access_scope == "accessible"
            runs, total = database.runs(tenant, now, query.limit, query.offset, accessible, query.project_id)
            cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
            return m.TrainingRunList(training_runs=_training_runs(database, tenant, runs), cursor=cursor)
        case m.ListCheckpoints():
            _run(database, tenant, query.run_id, accessible=True)
            rows, _ = database.checkpoints(tenant, now, query.run_id, or_public=True)
            return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows])
        case m.ListUserCheckpoints():
            rows, total = database.checkpoints(tenant, now, None, query.limit, query.offset)
            cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
            return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows], cursor=cursor)
        case _:
            raise AssertionError(f"{type(query).__name__} is answered elsewhere")


def _run(database: Database, tenant: str, run_id: str, accessible: bool) -> tables.Run:
    row = database.run(tenant, run_id, time.time(), accessible)
    if row is None:
        raise NotFound(f"run_id: no training run {run_id[:200]!r}")
    return row
