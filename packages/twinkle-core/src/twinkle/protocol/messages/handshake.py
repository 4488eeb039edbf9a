"""What a client asks before it opens a session: the server's flags, a token for its key, the models there are."""

from twinkle.protocol.messages.base import Query
from twinkle.protocol.types import Value


class ClientConfigRequest(Value):
    """SDK to gateway, once for each address and key."""

    sdk_version: str = ""


class ClientConfig(Value):
    """Gateway to SDK: the SDK's flags that this server sets; those left out keep the SDK's defaults."""

    pjwt_auth_enabled: bool = True
    proto_compress_fwdbwd: bool = True
    custom_loss_server_side: bool = True
    sample_use_retrieve_futures: bool = True
    sample_join_sampling_session: bool = True
    # The SDK's other transport has threads in Rust. Before Python 3.14 a reply that arrives while a program ends makes
    # the interpreter end such a thread in the middle of a call, and the process aborts: 4 of 64 programs that sampled.
    use_pyqwest_transport: bool = False
    # Read by older SDKs only (0.22 to 0.36).
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    create_model_via_load_weights: bool = True


class DynamicConfig(Value):
    """Gateway to SDK: flags that the SDK fetches again every `refresh_interval_sec`."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True


class AuthTokenResponse(Value):
    """Gateway to SDK: a token that stands for the caller's key for a while, a JWT (RFC 7519)."""

    jwt: str


class SupportedModel(Value):
    """Part of `ServerCapabilities`: a base model of this server.

    Attributes:
        max_context_length: longest sequence, in tokens.
        max_lora_rank: highest rank of an adapter. (A Twinkle addition.)
        vocab_size: token ids are below it. (A Twinkle addition.)
    """

    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True
    max_lora_rank: int
    vocab_size: int


class ServerCapabilities(Value):
    """Service to client, and to the gateway, which derives limits on request bodies from it."""

    supported_models: list[SupportedModel]


class GetServerCapabilities(Query[ServerCapabilities], method="GET", path="/get_server_capabilities"):
    """Client or gateway to service: which base models are there?"""
