"""The training client: one run and its adapter."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from tqdm import tqdm

from twinkle.data_format import to_datum
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, TwinkleError
from twinkle.protocol.metrics import reduce_metric
from twinkle.protocol.types import AdamParams, Datum, ForwardBackwardOutput, LossFnConfig, make
from twinkle.protocol.uris import as_twinkle
from twinkle.verbs import custom_loss
from twinkle.verbs.channel import Channel
from twinkle.verbs.custom_loss import ClientLoss, ClosedFormLoss, LossHandle
from twinkle.verbs.futures import Pending, chain, first_failure, wait
from twinkle.verbs.sampling import SamplingClient

R = TypeVar("R")

Batch: TypeAlias = Sequence[Datum | Mapping[str, Any]]
"""What a training pass takes: Datums, or the features (`input_ids`, `labels`) that a DataLoader yields."""

CUSTOM_LOSS = "custom"

_ONE_PROCESS = (
    "a run's requests are numbered, by one process alone. To go on with its weights in another, save_state() here and "
    "create_training_client_from_state(path) there; sampling clients can be used in both"
)

# Most datums and tokens of one request (a single datum may be longer).
MAX_REQUEST_DATUMS = 1024
MAX_REQUEST_TOKENS = 131_072

# With more than this many operations in flight, a call waits for the oldest.
MAX_UNDER_WAY = 32


class TrainingClient:
    """One training run. Created by `ServiceClient.create_lora_training_client`.

    Every verb returns a `Pending` at once, and the server carries out the operations in the order of the calls, so a
    plain loop keeps the server busy. If an operation fails and nobody looks at its `Pending`, the next call raises the
    error (or it is printed when the program ends).

    It numbers its operations, so only one process can use it: it raises in a forked one, and can't be pickled.
    """

    def __init__(
        self, channel: Channel, run_id: str, session_id: str, sampling_counter: itertools.count[int]
    ) -> None:
        self._channel = channel
        self._session_id = session_id
        self._sampling_counter = sampling_counter
        self._next_seq_id = 1
        self._under_way: deque[Pending[Any]] = deque()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.model_id = run_id
        """The run's id on the server."""

    # ------------------------------------------------------------ train

    def forward_backward(
        self, data: Batch, loss_fn: str = "cross_entropy", loss_fn_config: LossFnConfig | None = None
    ) -> Pending[ForwardBackwardOutput]:
        """Add the gradient of the loss over `data` to the gradient accumulated since the last step.

        Args:
            data: Datums, or features with `input_ids` and `labels`.
            loss_fn: cross_entropy, importance_sampling, ppo, cispo, dro or gspo; the sum over all tokens is minimised.
            loss_fn_config: parameters of the loss, such as `clip_low_threshold` and `clip_high_threshold`.

        Returns:
            `loss_fn_outputs[i]["logprobs"]` float32 [T_i], and `metrics["loss:sum"]`.

        Raises:
            TwinkleError: if an earlier operation failed and nobody looked at it; this one is then not sent.
        """
        return self._pass(data, loss_fn, loss_fn_config, forward_only=False)

    def forward(
        self, data: Batch, loss_fn: str = "cross_entropy", loss_fn_config: LossFnConfig | None = None
    ) -> Pending[ForwardBackwardOutput]:
        """Like `forward_backward`, but nothing is accumulated: log-probabilities and loss only."""
        return self._pass(data, loss_fn, loss_fn_config, forward_only=True)

    def _pass(
        self, data: Batch, loss_fn: str, config: LossFnConfig | None, forward_only: bool
    ) -> Pending[ForwardBackwardOutput]:
        self._raise_unseen_failures()
        datums = _as_datums(data)
        # The server would wait for a sequence id that is taken but never sent, so arguments are checked first.
        _check_loss(loss_fn, config)
        with self._lock:
            futures: list[Future[ForwardBackwardOutput]] = []
            for chunk in split_batch(datums):
                request = m.ForwardBackwardRequest(
                    self.model_id, self._next_seq_id, chunk, loss_fn, dict(config or {}), forward_only
                )
                futures.append(cast(Future[ForwardBackwardOutput], self._channel.submit(request)))
                self._next_seq_id += 1
        name = "forward" if forward_only else "forward_backward"
        return self._keep(Pending(chain(futures, join_outputs), f"{name} of {len(datums)} sequences"))

    def forward_backward_custom(
        self, data: Batch, loss_fn: ClientLoss | ClosedFormLoss | LossHandle
    ) -> Pending[ForwardBackwardOutput]:
        """`forward_backward` with a custom loss.

        A function runs here, on log-probabilities from a forward pass, which this call waits for; its gradient goes to
        the server as the weights of a second pass. The server runs a `LossHandle` in a single pass.

        Args:
            loss_fn: a loss of `twinkle.loss`, which needs no torch; or `(data, logprobs) -> (loss, metrics)`, where
                `logprobs` are torch tensors, one per datum, of the shape of its `target_tokens`, and `loss` is a scalar
                tensor.

        Returns:
            As `forward_backward`, with the function's metrics, and its loss as `loss:sum`.

        Raises:
            InvalidRequest: if a function needs torch and it is not installed, or the function returns no such loss.
        """
        if isinstance(loss_fn, LossHandle):
            return self.forward_backward(data, CUSTOM_LOSS, {"loss_id": loss_fn.loss_id})
        datums = _as_datums(data)
        forward = self.forward(custom_loss.without_gradient(datums)).result()
        surrogate = custom_loss.differentiate(loss_fn, datums, forward)
        passed = self.forward_backward(surrogate.data)
        return passed.then(lambda output: custom_loss.with_custom_metrics(output, surrogate))

    def optim_step(
        self,
        adam_params: AdamParams | None = None,
        *,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
    ) -> Pending[m.OptimStepResponse]:
        """Take one AdamW step with the accumulated gradient, and reset it to zero.

        Without a gradient, the moments still decay and move the weights.

        Args:
            adam_params: all parameters together; the other arguments override single ones. Default: those of
                `AdamParams`: learning_rate 1e-4, beta1 0.9, beta2 0.95, no decay, no clipping.

        Returns:
            `metrics["grad_norm:mean"]`, the gradient's norm before clipping.
        """
        given = {
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_clip_norm": grad_clip_norm,
        }
        base = adam_params.model_dump() if adam_params else {}
        params = AdamParams(**base | {name: value for name, value in given.items() if value is not None})
        request = m.OptimStepRequest(model_id=self.model_id, seq_id=0, adam_params=params)
        return self._send(request, m.OptimStepResponse, "optim_step")

    # ------------------------------------------------------------ save and load

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, Any] | None = None,
    ) -> Pending[m.SaveWeightsResponse]:
        """Save weights and optimizer as the checkpoint `name`, without a gradient that no step has used yet.

        Args:
            ttl_seconds: delete the checkpoint after this time; default: keep it.
            overwrite: replace this run's checkpoint of the same name, else an error.

        Returns:
            `path`, the checkpoint's full name, `twinkle://RUN/weights/NAME`; `twinkle://NAME` finds it too.
        """
        request = make(
            m.SaveWeightsRequest,
            model_id=self.model_id,
            path=name,
            seq_id=0,
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
            user_metadata=user_metadata,
        )
        saved = self._send(request, m.SaveWeightsResponse, f"save_state {name!r}")
        return saved.then(lambda response: m.SaveWeightsResponse(path=as_twinkle(response.path)))

    def load_state(self, path: str) -> Pending[m.LoadWeightsResponse]:
        """Load a checkpoint's weights and reset the optimizer."""
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> Pending[m.LoadWeightsResponse]:
        """Load a checkpoint's weights and optimizer: training resumes as if it had never stopped."""
        return self._load(path, optimizer=True)

    def _load(self, path: str, optimizer: bool) -> Pending[m.LoadWeightsResponse]:
        request = make(m.LoadWeightsRequest, model_id=self.model_id, path=path, seq_id=0, optimizer=optimizer)
        return self._send(request, m.LoadWeightsResponse, f"load_state {path!r}")

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, Any] | None = None
    ) -> Pending[m.SaveWeightsForSamplerResponse]:
        """Save only the weights, as a checkpoint to sample from."""
        request = make(
            m.SaveWeightsForSamplerRequest,
            model_id=self.model_id,
            seq_id=0,
            path=name,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata,
        )
        saved = self._send(request, m.SaveWeightsForSamplerResponse, f"save_weights_for_sampler {name!r}")
        return saved.then(
            lambda response: response.model_copy(update={"path": as_twinkle(response.path or "")})
        )

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: Sequence[str] | None = None,
    ) -> Pending[m.SaveWeightsExternalResponse]:
        """Save the weights as files to download, in PEFT's layout: see `RestClient.download_checkpoint`.

        Args:
            age_encryption_recipients: age public keys (`age1...`) to encrypt the files for, if the server supports it;
                the server can't read them afterwards.
        """
        recipients = None if age_encryption_recipients is None else list(age_encryption_recipients)
        request = make(
            m.SaveWeightsExternalRequest,
            model_id=self.model_id,
            seq_id=0,
            path=name,
            ttl_seconds=ttl_seconds,
            age_encryption_recipients=recipients,
        )
        saved = self._send(request, m.SaveWeightsExternalResponse, f"save_weights_external {name!r}")
        return saved.then(lambda response: response.model_copy(update={"path": as_twinkle(response.path)}))

    def save_weights_and_get_sampling_client(self) -> SamplingClient:
        """A client that samples from the current weights, unaffected by later training."""
        request = make(
            m.SaveWeightsForSamplerRequest,
            model_id=self.model_id,
            seq_id=0,
            sampling_session_seq_id=next(self._sampling_counter),
        )
        saved = self._send(request, m.SaveWeightsForSamplerResponse, "snapshot for the sampler").result()
        if saved.sampling_session_id is None:
            raise TwinkleError("the server made no sampling session for the snapshot")
        return SamplingClient(self._channel, saved.sampling_session_id)

    async def save_weights_and_get_sampling_client_async(self) -> SamplingClient:
        """`save_weights_and_get_sampling_client` for event loops."""
        return await asyncio.to_thread(self.save_weights_and_get_sampling_client)

    # ------------------------------------------------------------ facts and end

    def get_info(self) -> m.GetInfoResponse:
        """Base model, rank and tokenizer of this run."""
        reply = self._channel.ask(m.GetInfoRequest(model_id=self.model_id))
        return wait(reply, "get_info")

    def unload(self) -> Pending[m.UnloadModelResponse]:
        """End the run and free its adapter, once earlier operations are done. Checkpoints are kept."""
        return self._send(m.UnloadModelRequest(model_id=self.model_id), m.UnloadModelResponse, "unload")

    def flush(self) -> None:
        """Wait until all submitted operations have ended.

        Raises:
            TwinkleError: the first failure that nobody has looked at.
        """
        self._require_own_process()
        with self._lock:
            waiting = list(self._under_way)
        for pending in tqdm(
            waiting, desc="finishing", unit="request", disable=_hide_bar(waiting), leave=False
        ):
            pending.wait_done()
        self._raise_unseen_failures()

    # ------------------------------------------------------------ how calls pipeline

    def _send(self, request: m.Ordered | m.UnloadModelRequest, _result: type[R], doing: str) -> Pending[R]:
        """Number and send a request, under a lock, so that requests are sent in the order of `seq_id`."""
        self._raise_unseen_failures()
        with self._lock:
            assert not isinstance(request, m.ForwardBackwardRequest), "passes are numbered chunk by chunk"
            numbered = request.model_copy(update={"seq_id": self._next_seq_id})
            sent = cast(Future[R], self._channel.submit(numbered))
            self._next_seq_id += 1
        # Cancelling the channel's own future might stop the request, for whose number the run would wait for ever.
        return self._keep(Pending(chain([sent], lambda results: results[0]), doing))

    def _keep(self, pending: Pending[R]) -> Pending[R]:
        """Track a pending operation, and block the caller while too many are in flight."""
        with self._lock:
            self._under_way.append(pending)
            too_many = len(self._under_way) > MAX_UNDER_WAY
            oldest = self._under_way[0]
        if too_many:
            oldest.wait_done()
        return pending

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"a training client can't be pickled: {_ONE_PROCESS}")

    def _require_own_process(self) -> None:
        if self._process != os.getpid():  # checked before taking the lock, which the parent may have held
            raise InvalidRequest(
                f"model_id: {self.model_id} is trained by the process that forked: {_ONE_PROCESS}"
            )

    def _raise_unseen_failures(self) -> None:
        self._require_own_process()
        with self._lock:
            failure, self._under_way = first_failure(self._under_way)
        if failure is not None:
            raise failure


def split_batch(data: Sequence[Datum]) -> list[list[Datum]]:
    """The datums of each request, in order. An empty batch is one empty request, which the server refuses.

    Gradients accumulate in the adapter, so splitting changes only how long other runs wait.
    """
    chunks: list[list[Datum]] = [[]]
    tokens = 0
    for datum in data:
        length = len(datum.model_input.tokens)
        if chunks[-1] and (len(chunks[-1]) == MAX_REQUEST_DATUMS or tokens + length > MAX_REQUEST_TOKENS):
            chunks.append([])
            tokens = 0
        chunks[-1].append(datum)
        tokens += length
    return chunks


def join_outputs(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The result of the whole batch, with the metrics that all requests have; means are weighted by datums."""
    if len(outputs) == 1:
        return outputs[0]
    names = set[str].intersection(*(set(output.metrics) for output in outputs))
    counts = [len(output.loss_fn_outputs) for output in outputs]
    return ForwardBackwardOutput(
        [datum for output in outputs for datum in output.loss_fn_outputs],
        {
            name: reduce_metric(name, [output.metrics[name] for output in outputs], counts)
            for name in sorted(names)
        },
        outputs[0].loss_fn_output_type,
    )


def _hide_bar(waiting: Sequence[Pending[Any]]) -> bool | None:
    """Hide the bar if everything is done; else tqdm decides (it is silent without a terminal)."""
    return True if all(pending.done() for pending in waiting) else None


def _check_loss(loss_fn: object, config: object) -> None:
    if not isinstance(loss_fn, str):
        raise InvalidRequest(
            f"loss_fn: {type(loss_fn).__name__} is no name of a loss; functions, and losses of twinkle.loss, go to "
            "forward_backward_custom"
        )
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise InvalidRequest(
            f"loss_fn_config: expected a mapping of names to numbers, got {type(config).__name__}"
        )
    for name, value in cast(Mapping[object, object], config).items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | np.integer | np.floating):
            raise InvalidRequest(f"loss_fn_config.{name}: {value!r:.80} is neither a number nor text")


def _as_datums(data: Sequence[object]) -> list[Datum]:
    datums: list[Datum] = []
    for i, item in enumerate(data):
        if isinstance(item, Mapping):
            datums.append(to_datum(cast(Mapping[str, Any], item)))
        elif isinstance(item, Datum):
            datums.append(item)
        else:
            raise InvalidRequest(
                f"data[{i}]: {type(item).__name__} is neither a Datum nor a feature; pass a list of Datums, or a batch "
                "of a DataLoader over an encoded dataset"
            )
    return datums
