"""`Dataset.encode` beside `datasets.map(batched=True)` with the same tokenizer and chat template, both in one process.

    python benchmarks/encode_dataset.py --model DIR [--rows 2000] [--rounds 5]

DIR holds tokenizer.json and a chat template. The map renders a batch with Transformers' `apply_chat_template` and
tokenises it in one call; it makes no labels, which `encode` does. Where `datasets` is not installed, the same function
is called on batches of a list. Prints rows a second, by wall clock and by CPU time, and the ratio of the medians; the
two take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinkle.dataset import Dataset
from twinkle.template import Template

_BATCH = 1000  # what `datasets.map` takes by default


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="encode_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    measure(arguments.model, arguments.rows, arguments.rounds)


def measure(model: Path, count: int, rounds: int) -> None:
    conversations = make_conversations(count)
    template = Template(model)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        lines = [json.dumps({"messages": each}) for each in conversations]
        path.write_text("\n".join(lines), encoding="utf-8")

        def ours() -> Callable[[], Any]:
            dataset = Dataset(str(path))
            dataset.set_template(template)
            return dataset.encode

        theirs, name = other(model, conversations)
        seconds: dict[str, list[tuple[float, float]]] = {"Dataset.encode": [], name: []}
        for _ in range(rounds):
            for who, prepare in (("Dataset.encode", ours), (name, theirs)):
                seconds[who].append(timed(prepare()))
    tokens = sum(len(template.encode({"messages": each})["input_ids"]) for each in conversations[:100]) / 100
    print(f"{count} rows of {tokens:.0f} tokens, {rounds} rounds by turns\n")
    print("| | rows/s | rows a CPU second |\n|---|---|---|")
    medians = {
        who: [statistics.median(each) for each in zip(*of, strict=True)] for who, of in seconds.items()
    }
    for who, (wall, cpu) in medians.items():
        print(f"| {who} | {count / wall:.0f} | {count / cpu:.0f} |")
    ratios = [theirs / ours for ours, theirs in zip(*medians.values(), strict=True)]
    print(f"| first / second | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def make_conversations(count: int) -> list[list[dict[str, str]]]:
    """Of one to three questions with answers, in words of varied lengths; the same each time."""
    draw = random.Random(0)
    syllables = ["ta", "ri", "mon", "eth", "gra", "ul", "ing", "pre", "son", "ver", "qui", "dal"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(3000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length)) + "."

    conversations: list[list[dict[str, str]]] = []
    for _ in range(count):
        messages = [{"role": "system", "content": "You answer briefly."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text(draw.randint(5, 40))})
            messages.append({"role": "assistant", "content": text(draw.randint(10, 120))})
        conversations.append(messages)
    return conversations


def other(
    model: Path, conversations: list[list[dict[str, str]]]
) -> tuple[Callable[[], Callable[[], Any]], str]:
    """What makes the work to compare with, and its name."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def batch(rows: dict[str, Any]) -> Any:
        return tokenizer(
            tokenizer.apply_chat_template(rows["messages"], tokenize=False), add_special_tokens=False
        )

    try:
        import datasets  # pyright: ignore
    except ImportError:
        batches = [conversations[i : i + _BATCH] for i in range(0, len(conversations), _BATCH)]
        return (
            lambda: lambda: [batch({"messages": each}) for each in batches],
            "Transformers on batches of a list",
        )
    made: Any = datasets
    made.disable_caching()
    made.disable_progress_bars()

    def prepare() -> Callable[[], Any]:
        rows = made.Dataset.from_dict({"messages": conversations})
        return lambda: rows.map(batch, batched=True)

    return prepare, "datasets.map(batched=True)"


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time of all threads."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


if __name__ == "__main__":
    main()
