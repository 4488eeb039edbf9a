"""One rank: a Ray actor that loads its part of the model and answers calls to it over RPC."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from typing import cast

import ray

from twinkle.server import logs, plugins
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.engine.worker import LocalWorker, build_worker
from twinkle.server.serve import torch_settings
from twinkle.server.serve.machine import on_this_machine, use_interface
from twinkle.server.serve.ray_place import place
from twinkle.server.serve.rpc import Address, Server


class Rank:
    """Ray calls these methods once each; all other calls reach its `LocalWorker`, through `rpc.Server`."""

    _loading: asyncio.Task[LocalWorker] | None = None
    _server: Server
    _store: object  # the ranks' store, which lasts as long as this

    async def preload(self, config: ModelConfig, backend: str, sampler: str | None) -> None:
        """Import what `serve` needs, which takes longer than the rest of loading."""
        logs.send("rank")
        torch_settings.before_import(config.device)
        with contextlib.suppress(Exception):  # `serve` raises it again, to a caller that waits for it
            plugins.find(plugins.TRAINING_BACKENDS, backend)
            if sampler is not None:
                plugins.find(plugins.SAMPLING_ENGINES, sampler)

    async def node(self) -> str:
        """Ray's id of the machine that this rank is on."""
        return ray.get_runtime_context().get_node_id()

    async def find_rendezvous(self, is_one_machine: bool) -> str:
        """Where the ranks of the group meet: a file that no other user can access, or a store of this rank's, which
        listens on the address that Ray knows this machine by.
        """
        if is_one_machine:
            return f"file://{tempfile.mkdtemp(prefix='twinkle-', dir=place())}/meeting"
        from twinkle.server.backends.meeting import open_store

        self._store, rendezvous = open_store(cast(str, ray.util.get_node_ip_address()))
        return rendezvous

    async def serve(
        self,
        callers_node: str,
        config: ModelConfig,
        backend: str,
        sampler: str | None,
        model_id: str | None,
        interface: str | None,
    ) -> Address | None:
        """Start loading the model, and take calls to its `LocalWorker`, which wait for that and raise its error.

        Args:
            callers_node: Ray's id of the machine that the caller is on.
            sampler: this rank's sampling engine, if it has one.
            model_id: by which the model is found on this machine, if it may be another than the caller's.
            interface: the network interface that ranks talk over; None: that of the machine's address, or what the
                environment says.

        Returns:
            None if another caller has this rank already.
        """
        if self._loading is not None:
            return None
        if model_id is not None:
            use_interface(interface)
        self._loading = asyncio.create_task(asyncio.to_thread(_load, config, backend, sampler, model_id))
        is_here = callers_node == ray.get_runtime_context().get_node_id()
        host = None if is_here else cast(str, ray.util.get_node_ip_address())
        self._server = Server(self._loading)
        return await self._server.listen(host)


def _load(config: ModelConfig, backend: str, sampler: str | None, model_id: str | None) -> LocalWorker:
    config = on_this_machine(config, model_id)
    torch_settings.set_threads(config.num_ranks)
    return build_worker(config, backend, sampler)
