"""What a client asks before it opens a session: the server's flags, a token for its key, the models there are."""

from twinkle.protocol.types import Value


class ClientConfigRequest(Value):
    sdk_version: str = ""


class ClientConfig(Value):
    """Flags of the SDK that this server sets; those left out keep the SDK's defaults."""

    pjwt_auth_enabled: bool = True
    proto_compress_fwdbwd: bool = True
    custom_loss_server_side: bool = True
    sample_use_retrieve_futures: bool = True
    sample_join_sampling_session: bool = True
    # The SDK's other transport has threads in Rust. Before Python 3.14 a reply that arrives while a program ends makes
    # the interpreter end such a thread in the middle of a call, and the process aborts: 4 of 64 programs that sampled.
    use_pyqwest_transport: bool = False
    # What older SDKs (0.22 to 0.36) look at; the present one passes them over.
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    create_model_via_load_weights: bool = True


class DynamicConfig(Value):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True


class AuthTokenResponse(Value):
    """A token that stands for the caller's key for a while: a JWT (RFC 7519)."""

    jwt: str


class SupportedModel(Value):
    """One base model of this server.

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


class GetServerCapabilities(Value):
    pass


class ServerCapabilities(Value):
    supported_models: list[SupportedModel]
