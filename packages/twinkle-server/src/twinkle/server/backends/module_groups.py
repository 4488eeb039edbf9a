"""Which of a decoder's linear layers belong to `train_attn`, `train_mlp` and `train_unembed`: told by their names.

Names are those of Transformers and PEFT, such as `model.layers.0.self_attn.q_proj`. Owns the rule only; a backend
knows which layers it has.
"""

from typing import Literal, TypeAlias

from twinkle.server.backends.protocol import AdapterSpec

ModuleGroup: TypeAlias = Literal["attn", "mlp", "unembed"]

_ATTENTION = frozenset(
    {"self_attn", "attn", "attention", "self_attention", "linear_attn", "linear_attention"}
)
_FEED_FORWARD = frozenset({"mlp", "feed_forward", "ffn", "shared_expert", "shared_experts", "shared_mlp"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})


def module_group(name: str) -> ModuleGroup | None:
    """The group of a linear layer; None for layers that get no low-rank term.

    Attention is softmax or linear attention, projections in and out. The routed experts of a mixture of experts are
    three-dimensional parameters, not linear layers, and are not trained; nor is the router. A shared expert is.
    """
    *parents, layer = name.split(".")
    if layer in _OUTPUT_HEADS:
        return "unembed"
    if layer in _ROUTERS:
        return None
    if not _ATTENTION.isdisjoint(parents):
        return "attn"
    return None if _FEED_FORWARD.isdisjoint(parents) else "mlp"


def wanted_groups(spec: AdapterSpec) -> frozenset[ModuleGroup]:
    """The groups that an adapter of this shape acts on."""
    flags: dict[ModuleGroup, bool] = {
        "attn": spec.train_attn,
        "mlp": spec.train_mlp,
        "unembed": spec.train_unembed,
    }
    return frozenset(group for group, wanted in flags.items() if wanted)
