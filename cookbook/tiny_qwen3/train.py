"""Trains a real language model of one million parameters in some minutes on a CPU: a Qwen3 that talks a little.

    python cookbook/tiny_qwen3/train.py             # writes cookbook/data/twinkle/tiny-qwen3

It learns to name capitals, opposites and colours, to repeat words, to add single digits (some of them) and to call a
tool `add` for larger numbers. It is stopped early on purpose: it is right often enough that rewards differ, and wrong
often enough that there is something left to learn, so that it is a starting point for reinforcement learning.
Weights, tokenizer and chat template lie in `cookbook/data`, so the cookbook's programs run without any download; this
is how they were made.

Needs torch, transformers and tokenizers (the development environment has them).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lessons import addition_of, lesson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from twinkle.template import Template

HERE = Path(__file__).parent
END_OF_TEXT, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=48, help="conversations a step")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-3, help="the highest; it rises, then falls to 0"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE.parent / "data" / "twinkle" / "tiny-qwen3")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    numbers = random.Random(args.seed)
    save_tokenizer(args.output)
    template = Template(args.output)
    model: Any = Qwen3ForCausalLM(config_of(template.tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05
    )
    with tqdm(total=args.steps, desc="training", unit="step") as progress:
        for _ in range(args.steps):
            loss = loss_of(model, [template.encode(lesson(numbers)) for _ in range(args.batch_size)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            progress.update()
    model.to(torch.bfloat16).save_pretrained(args.output)
    show(model.float().eval(), template)


# ---------------------------------------------------------------- tokenizer and model


def save_tokenizer(folder: Path) -> None:
    """Byte-level BPE, each digit a token of its own, learnt from lessons; and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = random.Random(0)
    tokenizer.train_from_iterator((text for _ in range(20_000) for text in texts(lesson(numbers))), trainer)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "chat_template.jinja", folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=CLOSE, pad_token=END_OF_TEXT
    ).save_pretrained(folder)


def texts(conversation: dict) -> Iterator[str]:
    """What is said in it, and the calls as the chat template writes them."""
    for message in conversation["messages"]:
        yield message["content"]
        for call in message.get("tool_calls", []):
            yield "\n" + json.dumps(call["function"]) + "\n"


def config_of(tokenizer: Tokenizer) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(CLOSE),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


def loss_of(model: Any, features: list) -> torch.Tensor:
    """Mean negative log-likelihood of what the assistant says, nats a token."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    labels = [torch.tensor(feature["labels"]) for feature in features]
    pad = torch.nn.utils.rnn.pad_sequence
    return model(
        input_ids=pad(rows, batch_first=True, padding_value=model.config.pad_token_id),
        # Padding follows the text, so that causal attention never sees it.
        labels=pad(labels, batch_first=True, padding_value=-100),
    ).loss


# ---------------------------------------------------------------- what it can do


def show(model: Any, template: Template) -> None:
    for question in ("Who are you?", "What is the capital of Peru?", "Say: red moon tree", "Hello!"):
        print(f"{question}\n  {answer(model, template, {'messages': [user(question)]})}")
    exam = random.Random("exam")
    sums = [(a, b) for a in range(10) for b in range(10)]
    right = [
        answer(model, template, {"messages": [user(addition_of(a, b, exam))]}) == str(a + b) for a, b in sums
    ]
    print(f"sums of single digits: {sum(right)} of {len(sums)} right")
    calls = 0
    lessons = (lesson(exam) for _ in iter(int, 1))
    with_tools = [each for each in (next(lessons) for _ in range(400)) if "tools" in each][:50]
    for each in with_tools:
        prompt = {"messages": each["messages"][:1], "tools": each["tools"]}
        calls += answer(model, template, prompt) in template.render(each)
    print(f"tool calls: {calls} of {len(with_tools)} right")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(model: Any, template: Template, conversation: dict) -> str:
    """The greedy answer."""
    prompt = torch.tensor(template.encode(conversation, add_generation_prompt=True)["input_ids"])[None]
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False
    )
    return template.decode(tokens[0, prompt.shape[1] :].tolist()).removesuffix(CLOSE)


if __name__ == "__main__":
    main()
