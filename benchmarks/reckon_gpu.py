"""What an H200 would make of a training step, reckoned: tokens/s, MFU, and what each improvement is worth.

    python benchmarks/reckon_gpu.py                                                          # print it
    python benchmarks/reckon_gpu.py --write benchmarks/results/2026-12-01-gpu-reckoned.md    # put it into the page

FLOPs and bytes of a pass follow from the model's sizes. `tests/benchmarks/test_reckon_gpu.py` counts them in passes of
the Transformers backend on narrow models, which are as `Levers()` says, but for attention and the head. How fast a GPU
does them is assumed (`Rates`), and so are the bytes that are left with kernels that have never run here. So these are
reckoned figures, not measured ones: `benchmarks/gpu.py` measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from on_gpu.models import SHAPES, config_of
from on_gpu.reckoning import Peak, Work, peak_of
from transformers import AutoModelForCausalLM, PreTrainedConfig


@dataclass(frozen=True)
class Rates:
    """What a device reaches, all of it assumed: FLOP/s, bytes/s and seconds.

    Attributes:
        products: of large matrix products in bfloat16; those of a hidden size below 2048 reach three quarters.
        attention: FlashAttention-2, as torch has it; with `varlen_attention` FlashAttention-3.
        memory: of kernels that stream.
        launch: of one kernel, on the host.
    """

    products: float = 650e12
    attention: float = 330e12
    varlen_attention: float = 600e12
    memory: float = 4.0e12
    launch: float = 5e-6


@dataclass(frozen=True)
class Levers:
    """How a pass is computed; the defaults are what was counted on 2026-12-01.

    Attributes:
        head: "by position": products of 2^24 logits over a few positions of all rows; "flat": of 2048 tokens;
            "fused": log-probabilities without logits in memory.
        fused_norms: norms, rotary embedding and SwiGLU as one kernel each.
        linear_attention_kernels: those of flash-linear-attention and causal-conv1d; else Transformers' reference code.
        packed: rows without padding one after another, and FlashAttention-3.
        fused_lora: terms added while the base's product is written, and inputs read once for q, k and v.
        fill: tokens that are not padding, of those that are computed.
    """

    head: Literal["by position", "flat", "fused"] = "by position"
    fused_norms: bool = False
    linear_attention_kernels: bool = False
    packed: bool = False
    fused_lora: bool = False
    fill: float = 1.0


@dataclass(frozen=True)
class Shape:
    """Of a model; widths are numbers a token has there."""

    name: str
    work: Work
    layers: int
    hidden: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, name: str, config: PreTrainedConfig) -> Shape:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        text = config.get_text_config()
        sizes = text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size
        return cls(name, Work.of(model), *sizes)

    @property
    def attention_channels(self) -> int:
        """Queries, keys, values, and what goes into the output, of all layers of full attention."""
        gate = self.work.query_width if self.work.linear_layers else 0  # Qwen3.5's output gate
        return self.work.full_layers * (2 * self.work.query_width + 2 * self.work.kv_width + gate)

    @property
    def linear_channels(self) -> int:
        """Keys and queries, values and gates, of all layers of linear attention."""
        return self.work.linear_layers * (2 * self.linear_keys + 2 * self.linear_values)

    @property
    def linear_values(self) -> int:
        return self.work.linear_heads * self.work.value_dim

    @property
    def linear_keys(self) -> int:
        """Half as many heads as values have, in the shapes that are published."""
        return self.linear_values // 2

    @property
    def widths(self) -> int:
        """Inputs and outputs of all layers' linear modules, together: what a LoRA of rank 1 has numbers."""
        h, q, kv = self.hidden, self.work.query_width, self.work.kv_width
        mlp = self.layers * 3 * (h + self.intermediate)
        queries = 2 * q if self.work.linear_layers else q
        full = self.work.full_layers * (3 * h + queries + 2 * kv + q + h)
        keys, values = self.linear_keys, self.linear_values
        small = 2 * self.work.linear_heads
        linear = self.work.linear_layers * (4 * h + 2 * keys + 2 * values + small + values + h)
        return mlp + full + linear


# Bytes a number, forward and backward, in bfloat16 with sums in float32.
_NORM, _FUSED_NORM = 120, 30
_ROTARY, _FUSED_ROTARY = 62, 8
_SWIGLU, _FUSED_SWIGLU = 33, 16
_RESIDUAL = 12
_LOGIT = 96
# Of a channel of linear attention, in rows of T tokens: the reference code copies states between its chunks.
_REFERENCE, _REFERENCE_BY_LENGTH = 420, 0.48
_KERNELS = 60
# Operations of a layer, all told, and of one whose linear attention is the reference code's.
_OPERATIONS, _FUSED_OPERATIONS = 232, 120
_REFERENCE_OPERATIONS, _REFERENCE_OPERATIONS_BY_LENGTH = 350, 0.69
# Of an adapter's number: what a micro-batch does with its copies and gradients, and an optimizer step.
_ADAPTER_PASS, _ADAPTER_STEP = 34, 40


def other_bytes(shape: Shape, levers: Levers, length: int) -> float:
    """Bytes a token that are neither of products and attention nor of the head."""
    norm, rotary, swiglu = _NORM, _ROTARY, _SWIGLU
    if levers.fused_norms:
        norm, rotary, swiglu = _FUSED_NORM, _FUSED_ROTARY, _FUSED_SWIGLU
    queries_and_keys = shape.work.full_layers * (shape.work.query_width + shape.work.kv_width)
    normed = shape.layers * 2 * shape.hidden + queries_and_keys
    recurrence = _KERNELS if levers.linear_attention_kernels else _REFERENCE + _REFERENCE_BY_LENGTH * length
    return (
        norm * normed
        + rotary * queries_and_keys
        + swiglu * shape.layers * shape.intermediate
        + _RESIDUAL * shape.layers * 2 * shape.hidden
        + recurrence * shape.linear_channels
    )


def product_bytes(shape: Shape) -> float:
    """Bytes a token of linear layers and their terms, without weights, which many tokens share."""
    return 4 * shape.widths + lora_bytes(shape, Levers())


def lora_bytes(shape: Shape, levers: Levers) -> float:
    """Bytes a token that terms move beyond the base's products: inputs and outputs once more, forward and backward."""
    return shape.widths * (4 if levers.fused_lora else 8)


def operations(shape: Shape, levers: Levers, length: int) -> float:
    """Kernels of a micro-batch, without the head's."""
    of_layer: float = _FUSED_OPERATIONS if levers.fused_norms else _OPERATIONS
    of_linear = of_layer
    if not levers.linear_attention_kernels:
        of_linear = _REFERENCE_OPERATIONS + _REFERENCE_OPERATIONS_BY_LENGTH * length
    return shape.work.full_layers * of_layer + shape.work.linear_layers * of_linear


def linear_flops(shape: Shape, adapter_numbers: int) -> float:
    """Operations a token of linear layers, without the head, and of their terms, forward and backward."""
    return 4 * (shape.work.weights - shape.hidden * shape.vocab) + 6 * adapter_numbers


@dataclass(frozen=True)
class Step:
    """Each tenant's pass and optimizer step."""

    tenants: int
    rows: int = 4
    length: int = 2048
    rank: int = 32
    micro_batch: int = 12_288  # tokens: what fits beside a 4B model, about


def seconds_by_part(shape: Shape, step: Step, levers: Levers, rates: Rates) -> dict[str, float]:
    """Of a whole step."""
    tokens = step.tenants * step.rows * step.length / levers.fill
    numbers = step.rank * shape.widths
    products = rates.products * (1.0 if shape.hidden >= 2048 else 0.75)
    in_micro_batch = min(tokens, step.micro_batch)
    micro_batches = tokens / in_micro_batch
    # A frozen layer's product runs with all tokens; two of FlashAttention's seven are computed once more.
    attention = 7 * shape.work.full_layers * (step.length + 1) * shape.work.query_width
    adapters = min(step.tenants, max(1.0, in_micro_batch / (step.rows * step.length)))
    parts = {
        "linear layers": tokens * linear_flops(shape, 0) / products,
        "attention": tokens * attention / (rates.varlen_attention if levers.packed else rates.attention),
        "norms, rotary, SwiGLU": tokens * other_bytes(shape, levers, step.length) / rates.memory,
        "LoRA": (
            tokens * lora_bytes(shape, levers)
            + _ADAPTER_PASS * micro_batches * adapters * numbers
            + _ADAPTER_STEP * step.tenants * numbers
        )
        / rates.memory,
        "head": tokens * _head_seconds(shape, step, levers, rates, products),
    }
    host = micro_batches * operations(shape, levers, step.length) * rates.launch
    parts["waiting for the host"] = max(0.0, host - sum(parts.values()))
    return parts


def _head_seconds(shape: Shape, step: Step, levers: Levers, rates: Rates, products: float) -> float:
    """Of a token: three products (the logits twice, their gradient), each of which reads the whole head."""
    head = shape.hidden * shape.vocab
    if levers.head == "fused":
        return 6 * head / products + 0.125 * _LOGIT * shape.vocab / 10 / rates.memory
    rows = max(1, step.micro_batch // step.length)
    together = 2048 if levers.head == "flat" else max(1, 2**24 // (rows * shape.vocab))
    product = max(2 * head / products, 2 * head / together / rates.memory)
    return 3 * product + _LOGIT * shape.vocab / rates.memory


@dataclass(frozen=True)
class Reckoned:
    tokens_per_second: float
    mfu: float
    parts: dict[str, float]


def reckon(shape: Shape, step: Step, levers: Levers, rates: Rates, peak: Peak) -> Reckoned:
    parts = seconds_by_part(shape, step, levers, rates)
    per_second = step.tenants * step.rows * step.length / sum(parts.values())
    flops = shape.work.training_flops(step.rank * shape.widths, step.length)
    return Reckoned(per_second, per_second * flops / peak.flops, parts)


def stages(shape: Shape) -> list[tuple[str, Levers]]:
    """Improvements, each on top of those before."""
    found = [("as counted", Levers())]

    def then(name: str, levers: Levers) -> None:
        found.append((name, levers))

    if shape.work.linear_layers:
        then("+ kernels of linear attention", replace(found[-1][1], linear_attention_kernels=True))
    then("+ head flat, 2048 tokens", replace(found[-1][1], head="flat"))
    then("+ norms, rotary, SwiGLU fused", replace(found[-1][1], fused_norms=True))
    then("+ log-probabilities fused", replace(found[-1][1], head="fused"))
    then("+ packed rows, FlashAttention-3", replace(found[-1][1], packed=True))
    then("+ LoRA fused", replace(found[-1][1], fused_lora=True))
    return found


# ---------------------------------------------------------------- the page


def page(device: str = "H200") -> str:
    peak = peak_of(device)
    assert peak is not None, device
    rates = Rates()
    products, attention, varlen = (
        rate / 1e12 for rate in (rates.products, rates.attention, rates.varlen_attention)
    )
    lines = [
        f"# Training steps on one {device}: reckoned, not measured",
        "",
        "By `python benchmarks/reckon_gpu.py`: no GPU had a part in this. FLOPs, bytes and kernels are those",
        "that passes of the backend were counted to have on narrow models (attention, head: by formula). What a GPU",
        "reaches is assumed:",
        "",
        f"- {products:.0f} TFLOP/s in products (three quarters of it at a hidden size below 2048), {attention:.0f} in",
        f"  attention, {varlen:.0f} with FlashAttention-3, {rates.memory / 1e12:.1f} TB/s of memory, "
        f"{rates.launch * 1e6:.0f} µs to launch a kernel",
        "- the bytes that fused kernels move, and those of flash-linear-attention",
        "",
        "Each line has all improvements above it too. Rank 32 on all linear layers but the head, 4 rows of 2048 tokens",
        "a tenant, no padding, 12,288 tokens in a micro-batch. A tenant's rows fill micro-batches alone, so that",
        "company changes little here. MFU is that of `benchmarks/on_gpu/reckoning.py`, "
        f"of {peak.flops / 1e12:.0f} TFLOP/s.",
    ]
    for name in SHAPES:
        shape = Shape.of(name, config_of(name, is_toy=False))
        lines += ["", f"## {name}", "", *_table(shape, rates, peak), "", *_parts(shape, rates, peak)]
    return "\n".join(lines) + "\n"


def _table(shape: Shape, rates: Rates, peak: Peak) -> list[str]:
    lines = ["| | 1 tenant | 8 tenants | 32 tenants |", "|---|---|---|---|"]
    for name, levers in stages(shape):
        cells = [reckon(shape, Step(tenants), levers, rates, peak) for tenants in (1, 8, 32)]
        shown = (f"{found.tokens_per_second:,.0f} tokens/s, {found.mfu:.0%}" for found in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _parts(shape: Shape, rates: Rates, peak: Peak) -> list[str]:
    """Microseconds a token at 8 tenants."""
    step = Step(8)
    tokens = step.tenants * step.rows * step.length
    named = stages(shape)
    found = [reckon(shape, step, levers, rates, peak).parts for _, levers in named]
    lines = [
        "µs a token, 8 tenants:",
        "",
        "| | " + " | ".join(found[0]) + " |",
        "|---" * (len(found[0]) + 1) + "|",
    ]
    for (name, _), parts in zip(named, found, strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{s / tokens * 1e6:.1f}" for s in parts.values()) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there")
    write: Path | None = parser.parse_args(arguments).write
    if write is None:
        print(page(), end="")
    else:
        write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
