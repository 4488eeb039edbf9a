from twinkle.server.backends.lora.module_groups import module_group, wanted_groups
from twinkle.server.backends.protocol import AdapterSpec


def test_names_of_common_decoders() -> None:
    expected = {
        "model.layers.0.self_attn.q_proj": "attn",
        "model.layers.11.self_attn.o_proj": "attn",
        "model.layers.0.linear_attn.in_proj_qkv": "attn",
        "model.layers.0.linear_attn.out_proj": "attn",
        "model.layers.0.mlp.gate_proj": "mlp",
        "model.layers.0.mlp.down_proj": "mlp",
        "model.layers.0.mlp.shared_expert.up_proj": "mlp",
        "model.layers.0.mlp.experts.gate_up_proj": "mlp",
        "model.layers.0.block_sparse_moe.experts.down_proj": "mlp",
        "model.layers.0.mlp.experts.3.down_proj": None,
        "model.layers.0.mlp.gate": None,
        "model.layers.0.mlp.gate.wg": None,
        "model.layers.0.mlp.shared_expert_gate": None,
        "model.decoder.layers.3.fc1": "mlp",
        "model.layers.3.fc2": "mlp",
        "model.vision.fc1": None,
        "model.embed_tokens": None,
        "lm_head": "unembed",
    }
    assert {name: module_group(name) for name in expected} == expected


def test_flags_are_groups() -> None:
    assert wanted_groups(AdapterSpec(rank=1)) == {"attn", "mlp", "unembed"}
    assert wanted_groups(AdapterSpec(rank=1, train_attn=False, train_unembed=False)) == {"mlp"}
