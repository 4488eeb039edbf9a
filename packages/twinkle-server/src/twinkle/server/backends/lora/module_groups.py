"""Which of a decoder's layers belong to `train_attn`, `train_mlp` and `train_unembed`, by their names.

Names are Transformers': of linear layers, such as `model.layers.0.self_attn.q_proj`, and of parameters with a matrix
for each routed expert, such as `model.layers.0.mlp.experts.gate_up_proj`. Only the rule is here; a backend knows which
layers it has.
"""

from collections.abc import Iterable

from twinkle.server.backends.protocol import ALL_GROUPS, AdapterSpec, ModuleGroup

_ATTENTION = frozenset(
    {"self_attn", "attn", "attention", "self_attention", "linear_attn", "linear_attention"}
)
_FEED_FORWARD = frozenset({"mlp", "feed_forward", "ffn", "shared_expert", "shared_experts", "shared_mlp"})
# Feed-forward layers directly in the decoder layer, as in OPT and XGLM: `...layers.0.fc1`.
_IN_THE_LAYER = frozenset({"fc1", "fc2"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})
_EXPERTS = "experts"

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""A routed experts' module has these parameters, in this order: [experts, out, in] each."""


def module_group(name: str) -> ModuleGroup | None:
    """The group of a linear layer or a routed experts' parameter; None if it gets no low-rank term.

    Attention is softmax or linear attention, projections in and out. Routed experts are trained as feed-forward layers
    if they are three-dimensional parameters; a linear layer for each expert would see other rows than the batch's. The
    router is never trained; a shared expert is.
    """
    *parents, layer = name.split(".")
    if _EXPERTS in parents:
        return "mlp" if is_expert_parameter(name) else None
    if layer in _OUTPUT_HEADS:
        return "unembed"
    if layer in _ROUTERS:
        return None
    if not _ATTENTION.isdisjoint(parents):
        return "attn"
    if not _ROUTERS.isdisjoint(parents):
        return None
    if layer in _IN_THE_LAYER and parents and parents[-1].isdecimal():
        return "mlp"
    return None if _FEED_FORWARD.isdisjoint(parents) else "mlp"


def is_expert_parameter(name: str) -> bool:
    """Whether this is the name of a parameter with a matrix for each routed expert."""
    return name.endswith(tuple(f".{_EXPERTS}.{parameter}" for parameter in EXPERT_PARAMETERS))


def groups_there_are(groups: Iterable[ModuleGroup]) -> tuple[ModuleGroup, ...]:
    """For `BaseModelInfo.trainable`: each group of a model's targets once."""
    found = frozenset(groups)
    return tuple(group for group in ALL_GROUPS if group in found)


def wanted_groups(spec: AdapterSpec) -> frozenset[ModuleGroup]:
    """The groups that an adapter of this shape acts on."""
    return frozenset(group for group in ALL_GROUPS if getattr(spec, f"train_{group}"))
