"""The client for listing and managing runs, checkpoints, sessions and usage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from twinkle import layouts
from twinkle.layouts import Layout
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import ConnectionFailed, InvalidRequest
from twinkle.protocol.uris import CheckpointKind, as_twinkle
from twinkle.verbs.channel import Channel
from twinkle.verbs.futures import wait
from twinkle.verbs.proxies import through

_DOWNLOAD_TIMEOUT = httpx.Timeout(60.0, connect=10.0)


class RestClient:
    """Created by `ServiceClient.create_rest_client`. Every method waits for its reply.

    Paths are full names, `twinkle://RUN/KIND/NAME`, as saving returned them.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    # ------------------------------------------------------------ runs

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: m.AccessScope = "owned",
        project_id: str | None = None,
    ) -> m.TrainingRunList:
        """A page of runs, newest first; "accessible" includes other tenants' runs with a published checkpoint."""
        query = m.ListTrainingRuns(
            limit=limit, offset=offset, access_scope=access_scope, project_id=project_id
        )
        return self._ask(query)

    def get_training_run(self, run_id: str, access_scope: m.AccessScope = "owned") -> m.TrainingRun:
        return self._ask(m.GetTrainingRun(run_id=run_id, access_scope=access_scope))

    # ------------------------------------------------------------ checkpoints

    def list_checkpoints(self, run_id: str) -> m.CheckpointList:
        """A run's checkpoints, newest first."""
        return self._ask(m.ListCheckpoints(run_id=run_id))

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> m.CheckpointList:
        """A page of all your checkpoints, newest first."""
        return self._ask(m.ListUserCheckpoints(limit=limit, offset=offset))

    def get_weights_info(self, path: str) -> m.WeightsInfo:
        """Base model and shape of a checkpoint."""
        return self._ask(m.WeightsInfoRequest(tinker_path=path))

    def delete_checkpoint(self, path: str) -> None:
        self._ask(m.DeleteCheckpoint(**_parts(path)))

    def publish_checkpoint(self, path: str) -> None:
        """Let anyone who has a checkpoint's full name read it."""
        self._ask(m.PublishCheckpoint(**_parts(path)))

    def unpublish_checkpoint(self, path: str) -> None:
        """Make a published checkpoint private again."""
        self._ask(m.UnpublishCheckpoint(**_parts(path)))

    def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Have a checkpoint deleted after this many seconds; None keeps it."""
        self._ask(m.SetCheckpointTtl(**_parts(path), ttl_seconds=ttl_seconds))

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        """Copy a checkpoint to a run of its own, which outlives the original.

        Args:
            path: your own checkpoint, or a published one.
            weights_access_token: the API key of the tenant that owns the checkpoint.

        Returns:
            The copy's path.
        """
        request = m.CopyWeightsRequest(
            source_path=path,
            destination_project_id=destination_project_id,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )
        return as_twinkle(self._ask(request).tinker_path)

    def download_checkpoint(self, path: str, directory: str | Path, layout: Layout = "peft") -> Path:
        """Download a checkpoint's files into `directory`, which is created if missing.

        Args:
            layout: "peft" is all files as saved, for PEFT on `AutoModelForCausalLM`; "serving" is the adapter under the
                names of the class in the base model's config.json, for vLLM and SGLang; "tinker" is for
                tinker-cookbook's `build_hf_model` and `build_lora_adapter`. See `twinkle.layouts`.

        Returns:
            The directory.

        Raises:
            InvalidRequest: if there is no such layout, or the checkpoint lacks what it needs.
            NotFound: if there is no such checkpoint.
            ConnectionFailed: if a file can't be fetched; earlier ones are kept.
        """
        layouts.check(layout)
        reply = self._ask(m.GetCheckpointUrls(**_parts(path)))
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if layout == "peft":
            _fetch_all(reply.urls, target, path)
            return target
        with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as fetched:
            wanted = {
                name: url for name, url in reply.urls.items() if name in (layouts.CONFIG, layouts.WEIGHTS)
            }
            _fetch_all(wanted, Path(fetched), path)
            return layouts.convert(fetched, target, layout)

    # ------------------------------------------------------------ sessions and samplers

    def list_sessions(self, limit: int = 20, offset: int = 0) -> list[str]:
        """A page of session ids, newest first."""
        return self._ask(m.ListSessions(limit=limit, offset=offset)).sessions

    def get_session(self, session_id: str) -> m.SessionInfo:
        """A session's runs and samplers."""
        return self._ask(m.GetSession(session_id=session_id))

    def search_sessions(self, **conditions: Any) -> Iterator[m.SessionSummary]:
        """All sessions that match the conditions (the fields of `SearchSessions`), newest first, fetched page by
        page.
        """
        query = m.SearchSessions.model_validate(conditions)
        while True:
            page = self._ask(query)
            yield from page.sessions
            if page.next_cursor is None:
                return
            query = query.model_copy(update={"cursor": page.next_cursor})

    def assign_session_project(self, session_id: str, project_id: str) -> None:
        self._ask(m.AssignSessionProject(session_id=session_id, project_id=project_id))

    def get_sampler(self, sampler_id: str) -> m.SamplerInfo:
        """What a sampling session samples from."""
        return self._ask(m.GetSampler(sampler_id=sampler_id))

    # ------------------------------------------------------------ accounts

    def get_usage(self, starting_on: datetime, ending_before: datetime) -> m.Usage:
        """Tokens and checkpoints by hour and session; both ends on the hour, at most 14 days apart."""
        return self._ask(m.GetUsage(starting_on=starting_on, ending_before=ending_before))

    def get_storage_usage(self, project_id: str | None = None) -> m.StorageUsage:
        """Number and size in bytes of your checkpoints, by project."""
        return self._ask(m.GetStorageUsage(project_id=project_id))

    def get_audit_log(self, day: date | None = None) -> m.AuditLog:
        """What was done to your checkpoints and projects on a day (in UTC; default: today)."""
        return self._ask(m.GetAuditLog(day=day))

    def _ask(self, query: m.Query[m.ReplyT]) -> m.ReplyT:
        return wait(self._channel.ask(query), type(query).__name__)


def _parts(path: str) -> dict[str, Any]:
    """Run, kind and name of a checkpoint's full name.

    Raises:
        InvalidRequest: if it is not a full name.
    """
    uri = uris.parse(path)
    if uri.run_id is None or uri.kind is None:
        raise InvalidRequest(
            f"path: {path!r} could mean several; give the full name, as save_state returned it"
        )
    kind: CheckpointKind = uri.kind
    return {"run_id": uri.run_id, "kind": kind, "name": uri.name}


def _fetch_all(urls: Mapping[str, str], target: Path, path: str) -> None:
    for name, url in tqdm(urls.items(), desc=f"downloading {path}", unit="file", disable=None):
        _fetch(url, target / Path(name).name)


def _fetch(url: str, target: Path) -> None:
    """Fetch a file from a signed address, or from this machine's disk."""
    if url.startswith("file://"):
        target.write_bytes(Path(httpx.URL(url).path).read_bytes())
        return
    partial = target.with_suffix(target.suffix + ".partial")
    try:
        with httpx.stream("GET", url, timeout=_DOWNLOAD_TIMEOUT) as response:
            response.raise_for_status()
            with partial.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
    except (httpx.HTTPError, ImportError, ValueError) as error:  # the last two: a proxy that httpx can't use
        raise ConnectionFailed(
            f"{target.name} could not be downloaded{through(url)} ({error}); try again"
        ) from error
    partial.replace(target)
