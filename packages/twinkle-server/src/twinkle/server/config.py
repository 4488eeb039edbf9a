"""The server's configuration: a tree of frozen objects, checked when it is loaded.

The flat file of the quick start is all that is needed:

    model:  {model_id: Qwen/Qwen3.5-4B, use_megatron: false, torch_dtype: bfloat16}
    server: {host: 0.0.0.0, port: 8000, num_replicas: 1}
    ray:    {num_gpus: 4}
"""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.validation import describe_validation


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelSection(_Section):
    """Which base model, and how it is computed."""

    model_id: str
    """`ms://org/name`, `hf://org/name`, `org/name`, `file:///dir` or a directory. Clients ask for it by this name."""
    use_megatron: bool = False
    """Train with Megatron (needs `pip install 'twinkle-server[megatron]'`) instead of Transformers."""
    torch_dtype: Literal["bfloat16", "float32"] | None = None
    """Of the frozen weights and the arithmetic. Default: bfloat16 on a GPU, float32 on a CPU. Adapters are always
    float32. (float16 has no numbers for small gradients; weights that are saved in it are converted.)"""
    data_parallel_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Copies of the model that share out the rows of each step, each on GPUs of its own. auto: as many as the GPUs are
    enough for; on a CPU one."""
    shard_base: bool = False
    """Each of those ranks holds a part of the base model instead of a copy, about one `data_parallel_size`-th, and
    gathers each layer when it is computed: for a model that doesn't fit one GPU. Not with Megatron, which has sizes of
    its own for that."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer (Megatron)."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share out the layers (Megatron)."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share out the routed experts of a mixture of experts (Megatron). They are taken from those of
    `tensor_parallel_size`, and added where these are fewer."""
    sequence_parallel: bool | None = None
    """Shard the activations between tensor-parallel matrix products along the sequence (Megatron): saves memory.
    Default: only where it is needed (a mixture of experts with `tensor_parallel_size` above 1)."""
    deterministic: bool = False
    """On a GPU: the same pass twice gives the same bits, as on a CPU. Costs speed; what has no such kernel is refused:
    a cumulative sum in a custom loss, Transformers' reference code of linear attention. vLLM is left as it is."""
    max_lora_rank: int = Field(default=128, ge=1)
    """Highest rank of an adapter."""
    max_context_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens. Default: the model's own limit."""
    replicas: int = Field(default=1, ge=1)
    """Engines with this model, each with copies and samplers of its own and about as many runs. With more than one,
    runs move to another when theirs is drained or can't go on."""
    max_resident_adapter_bytes: int | None = Field(default=None, ge=1)
    """Bytes that the adapters of training runs may take where the model computes, with moments and gradients, on all
    ranks together. Beyond them the least recently used are kept in `storage.root`, and come back when their runs go on.
    Default: what the backend finds room for."""

    heartbeat_timeout_seconds: float = Field(default=60, gt=0)
    """A process of the model that answers no heartbeat for so long (it is stopped, or its machine is) is replaced as if
    it had ended: all of them are started again, and no run loses anything."""
    call_timeout_seconds: float | None = Field(default=None, gt=0)
    """The same for processes that answer, but have been at one training call for so long. Longer than the largest batch
    takes, since that fails if it is cut off twice. Default: 3600 on GPUs, and no limit on a CPU. Loading the model and
    drawing samples have no limit."""

    @model_validator(mode="before")
    @classmethod
    def _no_context_parallelism(cls, values: Any) -> Any:
        if isinstance(values, dict) and "context_parallel_size" in values:
            raise ValueError(
                "context_parallel_size is not offered: no sequence is shared out to several ranks (Megatron-Core 0.16 "
                "can't do that with Qwen3.5's linear attention); for long sequences set sequence_parallel: true "
                "with tensor_parallel_size, which share out most of their activations"
            )
        return cast(Any, values)

    @field_validator("torch_dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ValueError(
                "float16 is not offered: gradients of small losses are no numbers of it, and would be rounded away; "
                "use 'bfloat16', or 'float32' where the device has no bfloat16"
            )
        return value


class ServerSection(_Section):
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port."""
    num_replicas: int = Field(default=1, ge=1)
    """HTTP worker processes. The first is the engine's own, which is enough until its core is full; with several
    engines all of them are processes apart."""
    public_url: str | None = None
    """Address that downloads are offered under, as clients reach it (behind a proxy). Default: where the request was
    sent."""
    tls_certificate: Path | None = None
    """PEM file of the certificate, and of those between it and its root: clients then use https. Together with
    `tls_key`."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key, without a passphrase."""

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """Certificate and key, if both are given."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return self.tls_certificate.expanduser(), self.tls_key.expanduser()

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerSection:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both, or none")
        return self


class AuthSection(_Section):
    """Who may use the server."""

    mode: Literal["open", "keys"] | None = None
    """open: any key will do, and so will none; each sees only its own. keys: only those that `twinkle-server keys
    create` has made. Default: keys if any was ever made when the server starts, else open."""


class RaySection(_Section):
    """What Ray may use."""

    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs to use, all of them. Default: those that are found. With 0, the server computes on the CPU, as it does where
    the environment has TWINKLE_DEVICE=cpu whatever stands here."""
    address: str | None = None
    """host:port of a Ray cluster to join, which `ray start` has begun on one or several machines; auto: the one that
    this machine belongs to. Default: a cluster of the server's own, on this machine alone. In a cluster `num_gpus`
    counts those of all machines."""
    network_interface: str | None = None
    """Network interface of each machine over which ranks on several machines talk (eth0). Default: that of the address
    which Ray knows the machine by."""


class SamplerSection(_Section):
    """How tokens are generated."""

    engine: str = "transformers"
    """Name of a sampling engine: transformers, vllm (needs `pip install 'twinkle-server[vllm]'`, here or in the
    environment of `python`), or one that another package brings. none: a server that only trains."""
    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs, out of `ray.num_gpus`, for samplers of their own: processes that draw samples while the others train.
    Default: none, and each copy of the model samples beside its training; but vllm, which can't, gets as many as
    `replicas` needs."""
    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Samplers of their own, with the whole model each. auto: as many as `num_gpus` is enough for; none where the
    model's copies sample, and one where they can't (vllm, or a model that is spread over ranks, on a CPU)."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most samplers of their own: `replicas` (auto: one) are always there, and others come and go with the load. GPUs
    are counted for all of them. Default: never more than `replicas`."""
    target_sequences: int = Field(default=32, ge=1)
    """With `max_replicas`: how many sequences each sampler is to draw, or have waiting. Where there are more for some
    seconds another sampler is started, and where fewer of them would do for a minute one ends."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share each layer of a sampler (vllm)."""
    python: Path | None = None
    """Python of the environment that samplers of their own run in, where their engine needs other versions of the
    libraries than the trainer. It needs twinkle-server too, and the same version of Ray and of Python."""
    max_resident_adapters: int = Field(default=64, ge=1)
    """Adapters kept in the sampler; others are read from their checkpoints when they are asked for."""


class LogSection(_Section):
    """What the server says of its work, on stderr: runs begun, ended, saved and evicted, refusals, lost processes."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is said."""
    format: Literal["text", "json"] = "text"
    """text: time, level, sentence, what it is about. json: an object a line, for a collector."""
    file: Path | None = None
    """Also appended to this file, which logrotate may move away."""
    access: bool = False
    """Also a line for each HTTP request: method, path, status, seconds."""


class StorageSection(_Section):
    """What outlives the process."""

    root: str | Path = "~/.twinkle/server"
    """Directory of checkpoints, and of all else that is kept. Or a URL for the checkpoints and the snapshots of runs:
    `s3://bucket/prefix` needs `pip install 'twinkle-server[s3]'`, and credentials in the environment."""
    local_root: Path = Path("~/.twinkle/server")
    """Where `root` is a URL: directory of what has to lie on a disk (the journal of accepted requests, the SQLite
    database). A server goes on with its runs only where this directory is."""
    database_url: str | None = None
    """Any SQLAlchemy URL: `postgresql://user@host/database` needs `pip install 'twinkle-server[postgresql]'`. Default:
    a SQLite file in `root`, or in `local_root` where `root` is a URL."""
    snapshot_seconds: float = Field(default=10.0, ge=0)
    """A snapshot of a run is written to `root` so many seconds after the run has changed (later if writing would take
    more than a 50th of the time); 0: at once. Whatever process is killed, nothing is lost: this is how much has to be
    computed again."""
    journal_flush: Literal["always", "second", "never"] = "second"
    """When the journal is fsynced, so that accepted requests survive a power cut. always: before they are acknowledged;
    second: once per second; never: by the operating system. (The end of a process loses nothing with any of them.)"""

    @field_validator("root")
    @classmethod
    def _root_names_a_place(cls, root: str | Path) -> str | Path:
        scheme, separator, place = str(root).partition("://")
        if not separator:
            return root
        if scheme == "file":
            return place
        if not place.strip("/"):
            raise ValueError(f"{root} names no bucket; give it as {scheme}://BUCKET/PREFIX")
        if "?" in place or "#" in place or "@" in place:
            raise ValueError(
                f"a URL is {scheme}://BUCKET/PREFIX and nothing else: credentials and addresses come from the "
                "environment"
            )
        return root

    @property
    def shared_url(self) -> str | None:
        """Of `root`, if it is a URL."""
        return str(self.root) if "://" in str(self.root) else None

    @property
    def directory(self) -> Path:
        """On this machine."""
        return (Path(self.root) if self.shared_url is None else self.local_root).expanduser()

    @property
    def is_on_database_server(self) -> bool:
        """Whether several machines may use the database."""
        return not self.url.startswith("sqlite")

    @property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.directory / 'twinkle.sqlite'}"


class LimitsSection(_Section):
    """What each tenant, and all together, may use; null is no limit."""

    # What refuses names its limit: 429 with Retry-After where waiting helps, 403 where something has to go first, 413
    # for a body. The highest rank is `model.max_lora_rank`, and what adapters may take where the model computes
    # `model.max_resident_adapter_bytes`.
    max_request_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Largest body in bytes, before and after decompression."""
    max_body_bytes_per_tenant: int | None = Field(default=512 * 2**20, ge=1024)
    """Bytes of bodies that are being read and decoded at once, at each process that reads HTTP."""
    max_body_bytes: int | None = Field(default=2**30, ge=1024)
    """The same for all tenants together."""
    max_connections: int | None = Field(default=16_384, ge=16)
    """Connections at each process that reads HTTP; fewer where it may not open so many files, a quarter of which it
    keeps for all else. Where there are more, the one that has been silent longest gives way."""
    max_requests_per_second_per_tenant: float | None = Field(default=1000, gt=0)
    """HTTP requests, polls included, at each process that reads HTTP; after a pause ten times as many at once."""
    max_requests_per_second: float | None = Field(default=10_000, gt=0)
    """The same for all tenants together."""
    max_queued_requests_per_tenant: int | None = Field(default=16_384, ge=1)
    """Requests that have been accepted and have no result yet."""
    max_queued_requests: int | None = Field(default=65_536, ge=1)
    """The same for all tenants together."""
    max_queued_tokens_per_tenant: int | None = Field(default=16 * 2**20, ge=1)
    """Tokens in such requests: of training passes, and of prompts."""
    max_queued_tokens: int | None = Field(default=64 * 2**20, ge=1)
    """The same for all tenants together."""
    max_unfetched_bytes_per_tenant: int | None = Field(default=2**30, ge=1)
    """Memory of results that have not been fetched."""
    max_unfetched_bytes: int | None = Field(default=4 * 2**30, ge=1)
    """The same for all tenants together; beyond it the oldest are dropped."""
    max_tokens_per_minute_per_tenant: float | None = Field(default=None, gt=0)
    """Tokens of training passes, of prompts, and sampled. Busy tenants get equal shares without it."""
    max_tokens_per_minute: float | None = Field(default=None, gt=0)
    """The same for all tenants together."""
    max_metadata_bytes: int | None = Field(default=16_384, ge=2)
    """Of the `user_metadata` of a session, run or checkpoint, as JSON."""
    max_sessions_per_tenant: int | None = Field(default=10_000, ge=1)
    """Sessions that are not finished and were begun within a day (or `max_session_idle_seconds`). Where there are as
    many in all, those go that are over and left nothing behind, no run, sampler or loss."""
    max_runs_per_tenant: int | None = Field(default=1000, ge=1)
    """Training runs that take requests."""
    max_runs: int | None = Field(default=10_000, ge=1)
    """The same for all tenants together."""
    max_checkpoints_per_tenant: int | None = Field(default=10_000, ge=1)
    """Checkpoints with a name."""
    max_checkpoints: int | None = Field(default=None, ge=1)
    """The same for all tenants together."""
    max_checkpoint_bytes_per_tenant: int | None = Field(default=2**40, ge=1)
    """Bytes of the checkpoints with a name; the one that goes beyond is the last."""
    max_checkpoint_bytes: int | None = Field(default=None, ge=1)
    """The same for all tenants together."""
    max_checkpoint_ttl_seconds: int | None = Field(default=None, ge=1)
    """Longest that a checkpoint may be kept, in seconds; those that are saved without a time get this one."""
    max_session_idle_seconds: int | None = Field(default=86_400, ge=1)
    """A session whose client asks for nothing for so long, not even a heartbeat, is let go: its runs are saved as
    checkpoints named 'twinkle-released', with optimizer, and end."""
    max_client_silence_seconds: float | None = Field(default=25, ge=15)
    """A client that has sent heartbeats (the SDK's come every 10 s), or waited for results, and isn't heard of for so
    long: its samples are stopped, and drawn again if it comes back within a quarter of an hour."""
    max_sampler_snapshots_per_run: int = Field(default=64, ge=1)
    """Snapshots without a name that a run leaves for sampling (one at each `save_weights_and_get_sampling_client`); the
    oldest go."""

    @classmethod
    def none(cls) -> LimitsSection:
        """No limits, for a single user on their own machine."""
        optional = [
            name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)
        ]
        return cls.model_validate(dict.fromkeys(optional))


class ModelEntry(ModelSection):
    """One of several base models: the keys of `model`, and these."""

    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs of each replica, out of `ray.num_gpus`. Default: those that are left over, shared out equally."""
    sampler: SamplerSection | None = None
    """How this model's tokens are generated. Default: as the section `sampler` says."""
    limits: LimitsSection | None = None
    """What differs from the section `limits` at this model's engines, each of which counts for itself."""


class ServerConfig(_Section):
    """The whole file."""

    model: ModelSection
    """Of a server with `models`, the first of them."""
    models: tuple[ModelEntry, ...] = ()
    server: ServerSection = ServerSection()
    auth: AuthSection = AuthSection()
    ray: RaySection = RaySection()
    sampler: SamplerSection = SamplerSection()
    storage: StorageSection = StorageSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        """Many parts of a server need to know of one model, and most servers have one."""
        given: dict[str, Any] = cast("dict[str, Any]", values) if isinstance(values, dict) else {}
        entries = given.get("models")
        if not isinstance(entries, list | tuple) or not entries or not isinstance(entries[0], dict):
            return cast(Any, values)
        entry = cast("dict[str, Any]", entries[0])
        own = {key: value for key, value in entry.items() if key in ModelSection.model_fields}
        return {**given, "model": own}

    @property
    def has_door(self) -> bool:
        """Whether there are several engines, or may be: processes apart from them answer HTTP."""
        return bool(self.models) or self.model.replicas > 1

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """The models, however they were given."""
        return self.models or (ModelEntry.model_validate(self.model.model_dump()),)

    def of_engine(self, entry: ModelEntry, num_gpus: int | None) -> ServerConfig:
        """The configuration of one engine, as if it were a server of its own.

        Args:
            num_gpus: those that it may use; None: all.
        """
        own = entry.model_dump(include=set(ModelSection.model_fields)) | {"replicas": 1}
        limits = self.limits if entry.limits is None else _changed(self.limits, entry.limits)
        return self.model_copy(
            update={
                "model": ModelSection.model_validate(own),
                "models": (),
                "sampler": self.sampler if entry.sampler is None else entry.sampler,
                "limits": limits,
                "ray": self.ray.model_copy(update={"num_gpus": num_gpus}),
            }
        )

    def as_json(self) -> str:
        """What makes the same configuration again."""
        return self.model_dump_json(exclude_unset=True, exclude={"model"} if self.models else None)

    @property
    def server_name(self) -> str:
        """Of this server among those that share a storage or a cluster: by port and model."""
        model = hashlib.sha256(self.model.model_id.encode()).hexdigest()[:12]
        return f"{self.server.port}-{model}"


def _changed(base: LimitsSection, by: LimitsSection) -> LimitsSection:
    """With those that were given."""
    return base.model_copy(update={name: getattr(by, name) for name in by.model_fields_set})


def load_config(path: str | os.PathLike[str]) -> ServerConfig:
    """Read and check a YAML file.

    Raises:
        InvalidRequest: naming each key that is wrong, and the nearest one where it is misspelt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{path}: not YAML ({error})") from error
    return parse_config(values, where=str(path))


def parse_config(values: object, where: str = "config") -> ServerConfig:
    """Check a configuration that has been read.

    Raises:
        InvalidRequest: as `load_config`.
    """
    if not isinstance(values, dict):
        raise InvalidRequest(
            f"{where}: must be a mapping with a section 'model', or a list 'models'; see "
            "twinkle-server check-config --help"
        )
    if "model" in values and values.get("models"):  # pyright: ignore[reportUnknownMemberType]
        raise InvalidRequest(f"{where}: model, models: give one model, or a list of several, not both")
    try:
        return ServerConfig.model_validate(values)
    except ValidationError as error:
        unknown = [
            _unknown_key([str(part) for part in problem["loc"]])
            for problem in error.errors(include_url=False)
            if problem["type"] == "extra_forbidden"
        ]
        raise InvalidRequest(f"{where}: " + ("; ".join(unknown) or describe_validation(error))) from error


def _unknown_key(location: list[str]) -> str:
    section: type[BaseModel] = ServerConfig
    for name in location[:-1]:
        if not name.isdigit():  # the place in a list
            section = _section_in(section.model_fields[name].annotation)
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{'.'.join(location)}: there is no such key; {hint}known here: {', '.join(known)}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section in a field's type: itself, one that may be left out, or those in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_in(each) for each in get_args(annotation) if each is not type(None))
