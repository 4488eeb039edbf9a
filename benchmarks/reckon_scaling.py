"""What bounds what beyond the machines that Twinkle was measured on: the tables of docs/scaling.md, from formulas.

    python benchmarks/reckon_scaling.py                                   # print the tables
    python benchmarks/reckon_scaling.py --write docs/scaling.md           # put them into the page

Bytes are counted by the server's own code: a request and its result are encoded, an adapter is laid out. Seconds are
those of `Measured`; the comments say where each was measured. Whatever else a table says follows from these by
arithmetic. `tests/docs/test_scaling.py` fails if page and arithmetic differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ForwardBackwardOutput, ModelInput, TensorData
from twinkle.server.backends.lora.banks import Layout, LinearShape
from twinkle.server.scheduling.records import Accepted, Done, encode

GB, MB = 1e9, 1e6


# ------------------------------------------------------------ what was measured, and what is assumed


@dataclass(frozen=True)
class Measured:
    """Seconds, on the hardware that is named."""

    # Of the engine's process, CPU for a step of the native client (one request), 2-core AMD EPYC,
    # benchmarks/results/2026-11-27-service-cpu-2-cores.md: 1.25 ms.
    step_seconds: float = 1.25e-3
    # Of the scheduler alone, for each operation with 10,000 tenants, 2-core Intel Xeon, beside other work,
    # benchmarks/results/2026-12-01-scheduler-simulated.md.
    scheduling_seconds: float = 38e-6


@dataclass(frozen=True)
class Assumed:
    """What nobody has measured here: there was no such hardware. Replace them by yours.

    Attributes:
        utilisation: of a GPU's arithmetic by a training pass.
        link_bytes: bytes a second between GPUs of different machines, one direction.
    """

    gpu_flops: float = 9.9e14  # bfloat16, an H100's data sheet, dense
    utilisation: float = 0.35
    link_bytes: float = 50e9  # 400 Gbit/s
    disk_bytes: float = 2e9
    gpu_memory: float = 80e9


# ------------------------------------------------------------ the model and its adapters


@dataclass(frozen=True)
class Base:
    """A dense decoder of the Llama and Qwen kind."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def linears(self) -> list[LinearShape]:
        """All linear layers that an adapter acts on: those of each layer, and the head."""
        kv = self.hidden * self.kv_heads // self.heads
        of_layer = {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, kv),
            "v": (self.hidden, kv),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }
        return [
            *(
                LinearShape(f"{i}.{name}", *sizes)
                for i in range(self.layers)
                for name, sizes in of_layer.items()
            ),
            LinearShape("head", self.hidden, self.vocab),
        ]

    def multiplied(self) -> int:
        """Weights that a token is multiplied with."""
        return sum(layer.in_features * layer.out_features for layer in self.linears())

    def parameters(self) -> int:
        """Without norms and biases."""
        return self.multiplied() + self.hidden * self.vocab

    def adapter(self, rank: int) -> int:
        """Numbers in an adapter on all linear layers."""
        return Layout.of(self.linears(), rank).size


QWEN_72B = Base("72B", 8192, 80, 29568, 64, 8, 152064)
QWEN_8B = Base("8B", 4096, 36, 12288, 32, 8, 151936)
RANK, TENSOR, PIPELINE = 32, 4, 2


# ------------------------------------------------------------ bytes, counted


@dataclass(frozen=True)
class JournalBytes:
    """Of a training step with one sequence: its pass, its optimizer step, and the results of both."""

    accepted: int
    done: int

    @property
    def total(self) -> int:
        return self.accepted + self.done


def journal_bytes(tokens: int, vocab: int = QWEN_72B.vocab) -> JournalBytes:
    """By the protocol's and the journal's own encoders: tokens, targets and weights in, log-probabilities out."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, vocab, tokens)
    inputs = {"target_tokens": ids, "weights": np.ones(tokens, np.float32)}
    work = m.ForwardBackwardRequest(
        "r" * 40, 1, [Datum(ModelInput.from_ints(ids.tolist()), inputs)], "cross_entropy"
    )
    step = m.OptimStepRequest(model_id="r" * 40, seq_id=2)
    logprobs = TensorData(draw.standard_normal(tokens).astype(np.float32))
    results = (
        ForwardBackwardOutput([{"logprobs": logprobs}], {"loss:sum": 1.5}),
        m.OptimStepResponse(metrics={"grad_norm:mean": 1.5}),
    )
    accepted = sum(
        len(encode(Accepted("i" * 32, "tenant", "r" * 40, 1, tokens, path, codec.encode(request), b"d" * 32)))
        for path, request in (("/api/v1/forward_backward", work), ("/api/v1/optim_step", step))
    )
    done = sum(len(encode(Done([("i" * 32, o.kind, o.body)]))) for o in map(codec.encode_result, results))
    return JournalBytes(accepted, done)


# ------------------------------------------------------------ tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def adapters_table() -> str:
    rows: list[list[str]] = []
    for base in (QWEN_8B, QWEN_72B):
        size = base.adapter(RANK)
        rows.append(
            [
                base.name,
                f"{size / 1e6:,.1f} million",
                number(4 * size / GB),
                number(12 * size / GB),
                number(16 * size / GB),
                number(12 * 1000 * size / 1e12),
            ]
        )
    head = [
        "base",
        f"numbers, rank {RANK}",
        "weights, GB",
        "idle (3 x), GB",
        "with a gradient (4 x), GB",
        "1,000 idle, TB",
    ]
    return table(head, rows)


def resident_adapters(base: Base, ranks: int, copies: int, assumed: Assumed) -> float:
    """How many adapters that are being trained fit into half of the memory beside the base, on the fullest rank.

    Weights are on every copy, moments and gradient on one of them.

    Args:
        ranks: of one copy.
    """
    room = 0.5 * (assumed.gpu_memory - 2 * base.parameters() / ranks)
    return room / ((4 + 12 / copies) * base.adapter(RANK) / ranks)


def resident_table() -> str:
    layouts = [
        (QWEN_8B, 1, 64),
        (QWEN_8B, 4, 16),
        (QWEN_8B, 8, 8),
        (QWEN_72B, 8, 8),
        (QWEN_72B, 16, 4),
        (QWEN_72B, 64, 1),
    ]
    rows = [
        [base.name, str(ranks), str(copies), number(resident_adapters(base, ranks, copies, Assumed()))]
        for base, ranks, copies in layouts
    ]
    return table(
        ["base on 64 GPUs", "ranks of a copy (TP x PP)", "copies", "adapters that are resident"], rows
    )


def tokens_per_second(base: Base, gpus: int, assumed: Assumed) -> float:
    """Forward, backward with respect to activations alone (the base is frozen): 4 operations a weight and a token."""
    return gpus * assumed.gpu_flops * assumed.utilisation / (4 * base.multiplied())


def service_table() -> str:
    measured, assumed = Measured(), Assumed()
    rows: list[list[str]] = []
    for base, gpus, tokens in (
        (QWEN_8B, 64, 1024),
        (QWEN_8B, 64, 16_384),
        (QWEN_72B, 64, 1024),
        (QWEN_72B, 64, 16_384),
    ):
        rate = tokens_per_second(base, gpus, assumed)
        steps = rate / tokens
        rows.append(
            [
                f"{base.name}, {tokens:,}",
                number(rate),
                number(steps),
                number(1000 / steps),
                number(steps * measured.step_seconds),
                number(2 * steps * measured.scheduling_seconds),
                number(steps * journal_bytes(tokens).total / MB),
            ]
        )
    head = [
        "base, tokens a step",
        "tokens/s",
        "steps/s",
        "seconds between a tenant's steps",
        "engine process, cores",
        "of these the scheduler",
        "journal, MB/s",
    ]
    return table(head, rows)


def exchange_table() -> str:
    """What data-parallel copies send for one adapter in a pass and its step (`backends/lora/replicas.py`)."""
    assumed = Assumed()
    rows: list[list[str]] = []
    for base, ranks_a_copy in ((QWEN_8B, 1), (QWEN_72B, TENSOR * PIPELINE)):
        part, copies = 4 * base.adapter(RANK) / ranks_a_copy, 64 // ranks_a_copy
        least, most = (
            2 * part,
            copies * part,
        )  # gradients to the owner, and new weights from it, which are passed on
        rows.append(
            [
                f"{base.name}, {copies} copies",
                number(part / MB),
                number((copies - 1) * part / MB),
                number(part / MB),
                number(least / assumed.link_bytes * 1e3),
                number(most / assumed.link_bytes * 1e3),
            ]
        )
    head = [
        "base on 64 GPUs",
        "gradient to the owner, MB, rows on one other copy",
        "on all copies",
        "new weights, MB to each rank",
        "ms on a link, rows on one copy",
        "on all copies",
    ]
    return table(head, rows)


def memory_table() -> str:
    """A rank of the 72B base at TP x PP, in the layout of the Megatron backend."""
    assumed, base, ranks = Assumed(), QWEN_72B, TENSOR * PIPELINE
    weights = 2 * base.parameters() / ranks
    adapter = 16 * base.adapter(RANK) / ranks
    shown = [
        ("base in bfloat16, a rank", weights / GB),
        ("a sampler with the whole base on one GPU", 2 * base.parameters() / GB),
        ("an adapter while it is trained, a rank", adapter / GB),
        ("left of a GPU of 80 GB beside the base", (assumed.gpu_memory - weights) / GB),
        ("adapters that half of that holds", 0.5 * (assumed.gpu_memory - weights) / adapter),
        ("a run snapshot, with gradient", 16 * base.adapter(RANK) / GB),
        ("seconds to write it", 16 * base.adapter(RANK) / assumed.disk_bytes),
        ("a published adapter, sent to each sampler", 4 * base.adapter(RANK) / GB),
        ("seconds of one link for it", 4 * base.adapter(RANK) / assumed.link_bytes),
    ]
    return table(
        ["72B at TP4 x PP2, rank 32", "GB, unless it says otherwise"],
        [[name, number(v)] for name, v in shown],
    )


TABLES = {
    "adapters": adapters_table,
    "resident": resident_table,
    "service": service_table,
    "exchange": exchange_table,
    "memory": memory_table,
    "journal": lambda: table(
        ["tokens of a step", "accepted, bytes", "done, bytes", "bytes a token"],
        [
            [f"{n:,}", f"{b.accepted:,}", f"{b.done:,}", number(b.total / n)]
            for n in (1, 128, 1024, 16_384)
            for b in [journal_bytes(n)]
        ],
    ),
}

_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables as they are reckoned now."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def places(page: str) -> Iterator[str]:
    yield from (found[1] for found in _PLACE.findall(page))


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md.")
    parser.add_argument("--write", type=Path, help="the page to put them into")
    page: Path | None = parser.parse_args().write
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, reckon in TABLES.items():
        print(f"{name}\n\n{reckon()}\n")


if __name__ == "__main__":
    sys.exit(main())
