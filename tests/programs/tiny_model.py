"""Makes the model that the programs train: a Qwen3 of two layers, and the tokenizer that goes with it.

Nothing is learnt, and nothing comes from a hub. Weights are random but for two habits without which the programs
would have nothing to train on:

- after any token it may end its answer, with a few percent of probability: a group of rollouts then earns different
  rewards, and advantages are not all zero;
- asked the way prompt_distillation asks, it answers "Final Answer: en": the data set that this recipe makes is not
  empty.

A habit is a hidden dimension of its own that the embedding of a token sets, and that the output head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

CONTEXT_LENGTH = 4096
VOCAB_SIZE = 1024

# Ends of a turn: in the format "Role: text", and in Qwen's.
END_OF_ROLE_COLON_TURN = "\n\nUser:"
END_OF_QWEN_TURN = "<|im_end|>"
# Last token of the prompt that Qwen's format makes when it asks for an answer without thinking.
BEFORE_ANSWER = "\n\n"
ANSWER = "Final Answer: en"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", END_OF_QWEN_TURN]
PHRASES = ["<think>", "</think>", END_OF_ROLE_COLON_TURN, ANSWER]

# As logits against a thousand others near zero: an end of a turn is worth a few percent, the answer is all but certain
# at the temperature that the recipe samples with (0.15).
_MAY_END = 5.0
_ALWAYS = 14.0


def save(directory: Path, texts: Sequence[str]) -> None:
    """Write config, weights and tokenizer, as `save_pretrained` lays them out.

    Args:
        directory: is created.
        texts: what the tokenizer learns its merges from.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokens = _save_tokenizer(directory, texts)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    everything = list(range(VOCAB_SIZE))
    ends = [tokens[END_OF_ROLE_COLON_TURN], tokens[END_OF_QWEN_TURN]]
    _add_habit(model, 0, after=everything, then=ends, logit=_MAY_END)
    _add_habit(model, 1, after=[tokens[BEFORE_ANSWER]], then=[tokens[ANSWER]], logit=_ALWAYS)
    _add_habit(model, 2, after=[tokens[ANSWER]], then=[tokens[END_OF_QWEN_TURN]], logit=_ALWAYS)
    model.save_pretrained(directory)


def _add_habit(
    model: Qwen3ForCausalLM, dimension: int, after: list[int], then: list[int], logit: float
) -> None:
    """Give the tokens `then` about this logit wherever the token before is one of `after`."""
    import torch

    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        embedding[:, dimension] = 0.0
        head[:, dimension] = 0.0
        embedding[after, dimension] = 1.0
        # The final norm scales a hidden vector to root mean square 1. The habits' dimensions outweigh the random
        # ones by far, so one that is set comes out near sqrt(hidden_size), or less where a second one is set too.
        head[then, dimension] = logit / model.config.hidden_size**0.5


def _save_tokenizer(directory: Path, texts: Sequence[str]) -> dict[str, int]:
    """Byte-level BPE of VOCAB_SIZE tokens; returns the ids of those with a habit and of the added ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(PHRASES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens(PHRASES)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[0]
    )
    fast.save_pretrained(directory)
    ids: dict[str, int] = {}
    for text in (*SPECIAL_TOKENS, *PHRASES, BEFORE_ANSWER):
        (ids[text],) = tokenizer.encode(text).ids
    return ids
