"""The service client, which creates training and sampling clients."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, cast

from twinkle._version import __version__
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import LoraConfig
from twinkle.verbs import custom_loss
from twinkle.verbs.channel import Channel
from twinkle.verbs.custom_loss import LossHandle, Rank
from twinkle.verbs.forks import reset_when_forked
from twinkle.verbs.futures import wait
from twinkle.verbs.rest import RestClient
from twinkle.verbs.sampling import SamplingClient
from twinkle.verbs.training import TrainingClient


class ServiceClientBase:
    """The verbs over a channel: `twinkle_client.ServiceClient` (a server), `twinkle.ServiceClient` (this process).

    Nothing is sent before the first verb. When the program ends it waits for operations in flight, unless the server
    can't be reached for half a minute; `close`, or a `with` block, does so earlier and unloads the adapters.

    A forked process opens its own session; training clients stay with the parent, sampling clients work in both.
    """

    def __init__(self, channel: Channel, user_metadata: dict[str, Any] | None = None) -> None:
        self._channel = channel
        self._user_metadata = user_metadata
        self._closed = False
        self._begin()
        atexit.register(self._close_at_exit)
        reset_when_forked(self)

    def _begin(self) -> None:
        self._session: str | None = None
        self._session_lock = threading.Lock()
        self._run_counter = itertools.count()
        self._sampling_counter = itertools.count()
        self._loss_counter = itertools.count()
        self._training_clients: list[TrainingClient] = []

    def after_fork(self) -> None:
        """In a forked process, leave the session and its runs to the parent; the next verb opens a new one."""
        self._begin()

    # ------------------------------------------------------------ training clients

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, Any] | None = None,
        alpha: float | None = None,
    ) -> TrainingClient:
        """Begin a training run with a new adapter.

        Args:
            base_model: the server's base model, under the name that the server gives it.
            rank: rank of the adapter.
            seed: the same seed gives the same initial adapter.
            train_mlp, train_attn, train_unembed: which linear layers get a low-rank term.
            alpha: the term is scaled by alpha / rank; the server's default is 32.

        Raises:
            InvalidRequest: if the server does not serve that model, or can't create such an adapter.
        """
        self._channel.prepare(base_model)
        config = LoraConfig(
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            alpha=alpha,
        )
        request = m.CreateModelRequest(
            session_id=self._session_id(),
            model_seq_id=next(self._run_counter),
            base_model=base_model,
            lora_config=config,
            user_metadata=user_metadata,
        )
        return self._begin_run(request, "create_lora_training_client")

    async def create_lora_training_client_async(self, base_model: str, **config: Any) -> TrainingClient:
        """`create_lora_training_client` for event loops, with the same arguments."""
        return await asyncio.to_thread(self.create_lora_training_client, base_model, **config)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Begin a run with a checkpoint's weights and a fresh optimizer.

        Args:
            weights_access_token: the API key of another tenant, whose checkpoint it is.
        """
        return self._from_state(path, base_model, user_metadata, weights_access_token, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Begin a run that resumes from a checkpoint, optimizer included."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, optimizer=True)

    async def create_training_client_from_state_async(
        self, path: str, *, with_optimizer: bool = False, **more: Any
    ) -> TrainingClient:
        """`create_training_client_from_state` (or `..._with_optimizer`) for event loops."""
        create = self.create_training_client_from_state
        if with_optimizer:
            create = self.create_training_client_from_state_with_optimizer
        return await asyncio.to_thread(create, path, **more)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, Any] | None,
        weights_access_token: str | None,
        optimizer: bool,
    ) -> TrainingClient:
        self._channel.prepare(base_model)
        self.flush()  # the checkpoint may be one whose saving is still in flight
        request = m.LoadWeightsRequest(
            path=path,
            optimizer=optimizer,
            session_id=self._session_id(),
            model_seq_id=next(self._run_counter),
            base_model=base_model,
            user_metadata=user_metadata,
            weights_access_token=weights_access_token,
        )
        return self._begin_run(request, f"loading {path!r}")

    def _begin_run(self, request: m.CreateModelRequest | m.LoadWeightsRequest, doing: str) -> TrainingClient:
        begun = cast(Future[m.CreateModelResponse | m.LoadWeightsResponse], self._channel.submit(request))
        run_id = wait(begun, doing).model_id
        client = TrainingClient(self._channel, run_id, self._session_id(), self._sampling_counter)
        self._training_clients.append(client)
        return client

    # ------------------------------------------------------------ sampling clients and the rest

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """A client that samples from a checkpoint, or from the base model itself.

        Args:
            model_path: a checkpoint of either kind, as saving returned it, or `twinkle://NAME`.
            base_model: required without `model_path`.

        Raises:
            NotFound: if there is no such checkpoint.
        """
        if model_path is None and base_model is None:
            raise InvalidRequest(
                "model_path, base_model: both are missing; give a checkpoint, or a base model"
            )
        self._channel.prepare(base_model)
        self.flush()  # the checkpoint may be one whose saving is still in flight
        request = m.CreateSamplingSessionRequest(
            session_id=self._session_id(),
            sampling_session_seq_id=next(self._sampling_counter),
            base_model=base_model,
            model_path=model_path,
        )
        reply = self._ask(request, "create_sampling_client")
        return SamplingClient(self._channel, reply.sampling_session_id)

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """`create_sampling_client` for event loops."""
        return await asyncio.to_thread(self.create_sampling_client, model_path, base_model)

    def create_custom_loss(self, loss_fn: Callable[..., Any], input_ranks: Mapping[str, Rank]) -> LossHandle:
        """Upload a loss for the server to run: `forward_backward_custom(data, handle)`.

        Args:
            loss_fn: `(logprobs, *others) -> (loss, metrics)` on one datum's torch tensors; the others are parameters
                named like entries of `loss_fn_inputs`, metrics are named custom/NAME:sum or :mean. It is traced by
                torch.fx: it must not branch on tensor values, and may call only torch and math.
            input_ranks: the rank of each parameter: 1 is [T], 2 is [T, K], 0 a scalar.

        Raises:
            InvalidRequest: if it can't be traced, or calls something the server doesn't allow.
        """
        inputs, graph = custom_loss.trace(loss_fn, input_ranks)
        request = m.CreateCustomLossRequest(
            session_id=self._session_id(),
            custom_loss_seq_id=next(self._loss_counter),
            name=getattr(loss_fn, "__name__", type(loss_fn).__name__),
            inputs=inputs,
            graph=graph,
        )
        made = cast(Future[m.CreateCustomLossResponse], self._channel.submit(request))
        return LossHandle(request.name, wait(made, "create_custom_loss").loss_id)

    def create_rest_client(self) -> RestClient:
        """A client for runs, checkpoints, sessions and usage."""
        return RestClient(self._channel)

    def get_server_capabilities(self) -> m.ServerCapabilities:
        """The server's base models, with their limits."""
        return self._ask(m.GetServerCapabilities(), "get_server_capabilities")

    # ------------------------------------------------------------ end

    def flush(self) -> None:
        """Wait until all submitted operations have ended.

        Raises:
            TwinkleError: the first failure that nobody has looked at.
        """
        for client in self._training_clients:
            client.flush()

    def close(self) -> None:
        """Flush, end the session and close connections. Checkpoints are kept, live adapters are not.

        Raises:
            TwinkleError: the first failure that nobody has looked at; the client is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        try:
            self.flush()
            if self._session is not None:
                request = m.FinishSessionRequest(session_id=self._session)
                self._ask(request, "closing")
        finally:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_at_exit(self) -> None:
        try:
            self._channel.hurry()
            self.close()
        except Exception as error:
            print(f"twinkle: a request that was still under way failed: {error}", file=sys.stderr)

    # ------------------------------------------------------------ inside

    def _session_id(self) -> str:
        with self._session_lock:
            if self._session is None:
                request = m.CreateSessionRequest(
                    sdk_version=f"twinkle-{__version__}",
                    user_metadata=self._user_metadata,
                    idempotency_key=uuid.uuid4().hex,
                )
                self._session = self._ask(request, "create_session").session_id
            return self._session

    def _ask(self, query: m.Query[m.ReplyT], doing: str) -> m.ReplyT:
        return wait(self._channel.ask(query), doing)
