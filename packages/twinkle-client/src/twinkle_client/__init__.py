"""The native client: train and sample LoRA adapters on a Twinkle server, without torch.

from twinkle_client import ServiceClient, init_twinkle_client

init_twinkle_client(base_url="http://localhost:8000", api_key="...")
training_client = ServiceClient().create_lora_training_client(base_model="Qwen/Qwen3.5-4B", rank=16)
"""

from twinkle.protocol.errors import (
    ConnectionFailed,
    InvalidRequest,
    LimitReached,
    NotFound,
    QuotaReached,
    RequestFailed,
    ServerFault,
    TooLarge,
    TwinkleError,
    Unauthorized,
    Unavailable,
)
from twinkle.verbs.futures import Pending
from twinkle.verbs.rest import RestClient
from twinkle.verbs.sampling import SamplingClient
from twinkle.verbs.training import TrainingClient
from twinkle_client import types
from twinkle_client._version import __version__
from twinkle_client.service import ServiceClient
from twinkle_client.settings import init_twinkle_client

__all__ = [
    "ConnectionFailed",
    "InvalidRequest",
    "LimitReached",
    "NotFound",
    "Pending",
    "QuotaReached",
    "RequestFailed",
    "RestClient",
    "SamplingClient",
    "ServerFault",
    "ServiceClient",
    "TooLarge",
    "TrainingClient",
    "TwinkleError",
    "Unauthorized",
    "Unavailable",
    "__version__",
    "init_twinkle_client",
    "types",
]
