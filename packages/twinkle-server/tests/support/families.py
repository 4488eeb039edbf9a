"""Tiny models of the families of Transformers 5 that train here exactly, and whose adapters PEFT loads.

Each is the class of its configuration, and what that is given. Layers are two: where a family has layers of several
kinds there is one of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import random_models
import tiny_moe
import transformers

# All families take these; those that differ say so.
SIZES: dict[str, Any] = {**tiny_moe.SIZES, "initializer_range": 0.1, "tie_word_embeddings": False}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 24}
DENSE_FIRST: dict[str, Any] = {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Rows are longer than the window.
WINDOW: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 128}
FALCON: dict[str, Any] = {"alibi": False, "ffn_hidden_size": 48, "head_dim": None}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (
        "AfmoeConfig",
        {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    ),
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "bitnet": ("BitNetConfig", {}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "codegen": ("CodeGenConfig", {**GPT2_SIZES, "n_ctx": 128}),
    "cohere": ("CohereConfig", {}),
    "cohere 2": ("Cohere2Config", WINDOW),
    "cohere 2 moe": ("Cohere2MoeConfig", EXPERTS),
    "cwm": ("CwmConfig", {**WINDOW, "bos_token_id": 1}),
    "deepseek v2": ("DeepseekV2Config", {**DENSE_FIRST, **LATENT}),
    "deepseek v3": ("DeepseekV3Config", {**DENSE_FIRST, **LATENT}),
    "deepseek v3.2": ("DeepseekV32Config", {**DENSE_FIRST, **LATENT}),
    "diffllama": ("DiffLlamaConfig", {}),
    "doge": ("DogeConfig", {}),
    "dots1": ("Dots1Config", DENSE_FIRST),
    "ernie 4.5": ("Ernie4_5Config", {}),
    "ernie 4.5 moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "exaone 4": ("Exaone4Config", WINDOW),
    "exaone moe": ("ExaoneMoeConfig", {**EXPERTS, **WINDOW, "num_shared_experts": 1}),
    "falcon": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, which adds in place": (
        "FalconConfig",
        {
            **FALCON,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "multi_query": True,
            "bias": True,
        },
    ),
    "falcon h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    "flex olmo": ("FlexOlmoConfig", EXPERTS),
    "gemma": ("GemmaConfig", {}),
    "gemma 2, with soft caps": ("Gemma2Config", {**WINDOW, "final_logit_softcapping": 2.0}),
    "gemma 3": ("Gemma3TextConfig", WINDOW),
    "gemma 4": (
        "Gemma4TextConfig",
        {**WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    ),
    "glm": ("GlmConfig", {}),
    "glm 4": ("Glm4Config", {}),
    "glm 4.5": ("Glm4MoeConfig", DENSE_FIRST),
    "glm 4 moe lite": ("Glm4MoeLiteConfig", {**DENSE_FIRST, **LATENT}),
    "gpt bigcode": ("GPTBigCodeConfig", {}),
    "gpt-j": ("GPTJConfig", GPT2_SIZES),
    "gpt neox": ("GPTNeoXConfig", {}),
    "gpt-oss": ("GptOssConfig", {**LOCAL, **WINDOW}),
    "granite, with scales": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "granite moe": ("GraniteMoeConfig", LOCAL),
    "granite moe hybrid": (
        "GraniteMoeHybridConfig",
        {**LOCAL, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
    ),
    "granite moe shared": ("GraniteMoeSharedConfig", {**LOCAL, "shared_intermediate_size": 24}),
    "helium": ("HeliumConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "hunyuan moe": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1}),
    "hy v3": ("HYV3Config", EXPERTS),
    "internlm 3": ("InternLM3Config", {}),
    "iquestcoder": ("IQuestCoderConfig", {}),
    "jais 2": ("Jais2Config", {}),
    "jetmoe": ("JetMoeConfig", LOCAL),
    "lfm 2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "lfm 2 moe": (
        "Lfm2MoeConfig",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "llama": ("LlamaConfig", {}),
    "llama 4": ("Llama4TextConfig", {**LOCAL, "intermediate_size_mlp": 48}),
    "mellum": ("MellumConfig", {}),
    "minicpm 3": ("MiniCPM3Config", LATENT),
    "minimax": (
        "MiniMaxConfig",
        {**LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "minimax m2": ("MiniMaxM2Config", LOCAL),
    "ministral": ("MinistralConfig", {}),
    "ministral 3": ("Ministral3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "nanochat": ("NanoChatConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo 2": ("Olmo2Config", {}),
    "olmo 3": ("Olmo3Config", WINDOW),
    "olmo hybrid": ("OlmoHybridConfig", LINEAR),
    "olmoe": ("OlmoeConfig", EXPERTS),
    "opt, feed-forward layers in the layer itself": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "persimmon": ("PersimmonConfig", {}),
    "phi": ("PhiConfig", {}),
    "phi 3": ("Phi3Config", {}),
    "phi moe": ("PhimoeConfig", LOCAL),
    "qwen 2": ("Qwen2Config", {}),
    "qwen 2 moe": ("Qwen2MoeConfig", {**EXPERTS, **SHARED}),
    "qwen 3": ("Qwen3Config", {}),
    "qwen 3 moe": ("Qwen3MoeConfig", EXPERTS),
    "qwen 3 next": ("Qwen3NextConfig", {**EXPERTS, **SHARED, **LINEAR}),
    "qwen 3.5": ("Qwen3_5TextConfig", LINEAR),
    "qwen 3.5 moe": ("Qwen3_5MoeTextConfig", {**EXPERTS, **SHARED, **LINEAR}),
    "seed-oss": ("SeedOssConfig", {}),
    "smollm 3": ("SmolLM3Config", {}),
    "solar open": ("SolarOpenConfig", DENSE_FIRST),
    "stablelm": ("StableLmConfig", {}),
    "starcoder 2": ("Starcoder2Config", {}),
    "vaultgemma": ("VaultGemmaConfig", {}),
    "xglm, likewise": (
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.0},
    ),
    "youtu": ("YoutuConfig", LATENT),
}
# Of these PEFT's own gradients in float32 are off by up to 6e-5 from those in float64.
ROUGH = ("gemma 4",)
# What every run of the tests looks at: those in most use, and one of each way to compute.
CHOSEN = (
    "deepseek v3",
    "falcon, which adds in place",
    "gemma 2, with soft caps",
    "gemma 3",
    "gemma 4",
    "glm 4.5",
    "gpt-oss",
    "granite, with scales",
    "lfm 2",
    "llama",
    "llama 4",
    "mistral",
    "mixtral",
    "opt, feed-forward layers in the layer itself",
    "phi 3",
    "qwen 2",
    "qwen 3 moe",
    "qwen 3 next",
    "qwen 3.5",
    "qwen 3.5 moe",
)


def save(name: str, directory: Path) -> Path:
    """One of FAMILIES, with random weights."""
    config, more = FAMILIES[name]
    settings = {key: value for key, value in (SIZES | more).items() if key != "head_dim" or value is not None}
    return random_models.save(getattr(transformers, config)(**settings), directory)
