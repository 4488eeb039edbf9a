"""One tenant of a server, by Tinker's SDK or by the native client: the same few verbs of both, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Client = str
CLIENTS = ("sdk", "native")
LOSS_FNS = ("cross_entropy", "importance_sampling", "ppo")


@dataclass(frozen=True)
class Tenant:
    """A tenant with a key of its own.

    Attributes:
        service: its ServiceClient.
        types: the module of the client's data types.
    """

    client: Client
    service: Any
    types: Any

    def close(self) -> None:
        """End the tenant's session and its runs."""
        if self.client == "sdk":
            self.service.close("success").result()
        else:
            self.service.close()


def connect(client: Client, base_url: str, api_key: str) -> Tenant:
    """
    Args:
        api_key: the SDK wants one that begins with `tml-`.
    """
    if client == "sdk":
        import tinker

        service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
        return Tenant(client, service, tinker.types)
    import twinkle_client

    service = twinkle_client.ServiceClient(base_url=base_url, api_key=api_key)
    return Tenant(client, service, twinkle_client.types)


def value(reply: Any) -> Any:
    """What the SDK answers with a future, the native client with the value itself."""
    return reply.result() if hasattr(reply, "result") else reply


def model_of(tenant: Tenant) -> str:
    """The name of the model that the server holds."""
    return str(value(tenant.service.get_server_capabilities()).supported_models[0].model_name)


def make_run(tenant: Tenant, model: str, rank: int, seed: int) -> Any:
    """A TrainingClient with a new adapter."""
    return value(tenant.service.create_lora_training_client(base_model=model, rank=rank, seed=seed))


def make_datum(types: Any, tokens: np.ndarray, loss_fn: str) -> Any:
    """A datum of random content: next-token targets, and whatever else the loss reads."""
    inputs, targets = tokens[:-1], tokens[1:]
    values: dict[str, Any] = {"target_tokens": types.TensorData.from_numpy(targets.astype(np.int64))}
    if loss_fn == "cross_entropy":
        values["weights"] = types.TensorData.from_numpy(np.ones(len(targets), np.float32))
    else:
        values["logprobs"] = types.TensorData.from_numpy(np.full(len(targets), -2.0, np.float32))
        values["advantages"] = types.TensorData.from_numpy(np.ones(len(targets), np.float32))
    return types.Datum(model_input=types.ModelInput.from_ints(inputs.tolist()), loss_fn_inputs=values)


def stepper(tenant: Tenant, training_client: Any, batch: list[Any], loss_fn: str) -> Callable[[], None]:
    """One step, pipelined as both clients' users do it: both requests are sent, then both results are waited for."""
    adam = tenant.types.AdamParams(learning_rate=1e-4)

    def step() -> None:
        passed = training_client.forward_backward(batch, loss_fn)
        stepped = training_client.optim_step(adam)
        passed.result()
        stepped.result()

    return step
