"""Lists of what a tenant has: runs and checkpoints."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar, cast

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest
from twinkle.verbs.channel import Channel
from twinkle.verbs.futures import wait

R = TypeVar("R")


class RestClient:
    """Made by `ServiceClient.create_rest_client`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> m.TrainingRunList:
        """A page of one's runs, newest first."""
        return self._ask(m.ListTrainingRuns(limit=limit, offset=offset), m.TrainingRunList)

    def get_training_run(self, run_id: str) -> m.TrainingRun:
        """One run."""
        return self._ask(m.GetTrainingRun(run_id=run_id), m.TrainingRun)

    def list_checkpoints(self, run_id: str) -> m.CheckpointList:
        """A run's checkpoints, newest first."""
        return self._ask(m.ListCheckpoints(run_id=run_id), m.CheckpointList)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> m.CheckpointList:
        """A page of all one's checkpoints, newest first."""
        return self._ask(m.ListUserCheckpoints(limit=limit, offset=offset), m.CheckpointList)

    def get_weights_info(self, path: str) -> m.WeightsInfo:
        """Base model and shape of a checkpoint."""
        return self._ask(m.WeightsInfoRequest(tinker_path=path), m.WeightsInfo)

    def delete_checkpoint(self, path: str) -> None:
        """Delete a checkpoint, by its full name."""
        uri = uris.parse(path)
        if uri.run_id is None or uri.kind is None:
            raise InvalidRequest(
                f"path: {path!r} could mean several; give the full name, as save_state returned it"
            )
        self._ask(m.DeleteCheckpoint(run_id=uri.run_id, kind=uri.kind, name=uri.name), m.Acknowledged)

    def _ask(self, query: m.Query, _reply: type[R]) -> R:
        return wait(cast(Future[R], self._channel.ask(query)), type(query).__name__)
