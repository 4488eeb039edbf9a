"""The names that are taken from vLLM. It is imported when an engine starts: few environments have it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from twinkle.protocol.errors import InvalidRequest

_INSTALL = "pip install 'twinkle-server[vllm]'"


@dataclass(frozen=True)
class VllmApi:
    """vLLM's classes; its types don't matter outside it."""

    version: str
    AsyncLLM: Any
    AsyncEngineArgs: Any
    EngineDeadError: type[Exception]
    LoRARequest: Any
    RequestOutputKind: Any
    SamplingParams: Any
    tokens_input: Any
    current_platform: Any


def load() -> VllmApi:
    """
    Raises:
        InvalidRequest: if vLLM is not installed here, or can't be imported.
    """
    try:
        vllm = import_module("vllm")
        params = import_module("vllm.sampling_params")
        return VllmApi(
            version=str(vllm.__version__),
            AsyncLLM=import_module("vllm.v1.engine.async_llm").AsyncLLM,
            AsyncEngineArgs=import_module("vllm.engine.arg_utils").AsyncEngineArgs,
            EngineDeadError=import_module("vllm.v1.engine.exceptions").EngineDeadError,
            LoRARequest=import_module("vllm.lora.request").LoRARequest,
            RequestOutputKind=params.RequestOutputKind,
            SamplingParams=params.SamplingParams,
            tokens_input=import_module("vllm.inputs.engine").tokens_input,
            current_platform=import_module("vllm.platforms").current_platform,
        )
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise InvalidRequest(
                f"sampler.engine: vllm is not installed in the sampler's environment; {_INSTALL} adds it. If its "
                "versions of other packages conflict with the server's, make an environment for it and set "
                "sampler.python to its Python"
            ) from error
        raise _unusable(error) from error
    except (ImportError, AttributeError) as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"sampler.engine: the vllm that is installed can't be used ({error}); {_INSTALL} installs a version that can"
    )
