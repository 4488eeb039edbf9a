"""What is changed in vLLM's workers, the processes that hold the model; vLLM mixes `TwinkleWorker` into its class.

1. A sampled token's log-probability is that of the distribution after the temperature and before top_k and top_p. vLLM
   gives it either before both or after both.
2. A prompt's log-probabilities have the low-rank term of the output head by each row's own adapter. vLLM takes the
   adapters of the rows that are sampled from: on a CPU that ends its process, elsewhere the numbers are wrong.
3. On a CPU low-rank terms are computed adapter by adapter. vLLM copies each row's matrices, and gives rows of the base
   model the matrices in the last slot.

vLLM has two model runners; which one a process has is found by what it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# Rows of each adapter: its slot, and the rows' indices; None: all rows.
Groups: TypeAlias = list[tuple[int, Tensor | None]]


class TwinkleWorker:
    """Methods for `AsyncLLM.collective_rpc`."""

    model_runner: Any

    def prepare_for_twinkle(self) -> None:
        """Make the changes, once the model is loaded.

        Raises:
            RuntimeError: if this vLLM lacks what they change.
        """
        runner = self.model_runner
        if (sampler := getattr(runner, "sampler", None)) is not None:
            _report_before_filters(sampler)
        rows = _PromptRows()
        _note_prompt_rows(runner, rows)
        on_cpu = torch.device(runner.device).type == "cpu"
        for punica in runner.lora_manager._adapter_manager.punica_wrapper_mapping.values():
            _change_head(punica, rows, on_cpu)
            if on_cpu:
                _change_linear(punica)
        if on_cpu:
            _change_convolution()


# ---------------------------------------------------------------- log-probabilities of samples


def _report_before_filters(sampler: Any) -> None:
    """See 1: replace the step that applies top_k and top_p by one that returns what was there before it."""
    if hasattr(sampler, "topk_topp_sampler"):
        filtered = sampler.topk_topp_sampler
        filtered.forward = _returning_logprobs(filtered.forward)
    elif hasattr(sampler, "_sample_random"):
        sampler._sample_random = _returning_logits(sampler._sample_random)
    else:
        raise RuntimeError(
            "vLLM's sampler has no step that this engine knows; install another version of vLLM"
        )


def _returning_logprobs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Of the first model runner."""

    def draw(
        logits: Tensor, generators: Any, k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if k is None and p is None:
            return forward(logits, generators, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)  # now: filters write into the logits
        return forward(logits, generators, k, p)[0], logprobs

    return draw


def _returning_logits(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Of the second model runner, which computes log-probabilities of the logits afterwards."""

    def draw(
        logits: Tensor, mapping: Any, mapping_np: Any, pos: Any, k: Any, p: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        if k is None and p is None:
            return sample(logits, mapping, mapping_np, pos, k, p, *rest)
        before = logits.clone()
        return sample(logits, mapping, mapping_np, pos, k, p, *rest)[0], before

    return draw


# ---------------------------------------------------------------- prompts


@dataclass
class _PromptRows:
    """While prompts are scored: the batch's hidden states [tokens, hidden], whose rows the head is given."""

    hidden: Tensor | None = None

    def scoring(self, score: Callable[..., Any], position: int) -> Callable[..., Any]:
        """`score`, whose argument at this position is the hidden states."""

        def noted(*args: Any) -> Any:
            self.hidden = args[position]
            try:
                return score(*args)
            finally:
                self.hidden = None

        return noted

    def first(self, x: Tensor) -> int:
        """The row of the hidden states at which `x`, a slice of them, begins."""
        assert self.hidden is not None
        step = self.hidden.stride(0) * self.hidden.element_size()
        offset = x.data_ptr() - self.hidden.data_ptr()
        if offset % step or not 0 <= offset // step <= len(self.hidden) - len(x):
            raise RuntimeError("vLLM scores a prompt by hidden states that are not the batch's")
        return offset // step


def _note_prompt_rows(runner: Any, rows: _PromptRows) -> None:
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        runner._get_prompt_logprobs_dict = rows.scoring(runner._get_prompt_logprobs_dict, 0)
        return
    scorer = getattr(runner, "prompt_logprobs_worker", None)
    if scorer is not None:
        scorer.compute_prompt_logprobs = rows.scoring(scorer.compute_prompt_logprobs, 1)
        scorer.compute_prompt_token_id_logprobs = rows.scoring(scorer.compute_prompt_token_id_logprobs, 1)


def _change_head(punica: Any, rows: _PromptRows, on_cpu: bool) -> None:
    """See 2; on a CPU 3 too."""
    theirs = punica.add_lora_logits

    def add_lora_logits(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **more: Any) -> Any:
        if rows.hidden is not None:
            first = rows.first(x)
            groups = _groups(punica.token_lora_indices[first : first + len(x)])
        elif on_cpu:
            groups = _groups(punica.sampler_indices[: len(x)])
        else:
            return theirs(y, x, a, b, scale, **more)
        _add_terms(y, x, a, b, scale, groups)
        return None

    punica.add_lora_logits = add_lora_logits


# ---------------------------------------------------------------- low-rank terms on a CPU


@dataclass
class _TokenGroups:
    """The groups of the batch's tokens, computed once a batch."""

    groups: Groups = field(default_factory=list[tuple[int, Tensor | None]])


def _change_linear(punica: Any) -> None:
    """See 3."""
    tokens, update = _TokenGroups(), punica.update_metadata

    def update_metadata(*args: Any, **more: Any) -> None:
        update(*args, **more)
        tokens.groups = _groups(punica.token_lora_indices)

    def add_lora_linear(
        y: Tensor,
        x: Tensor,
        a: tuple[Tensor, ...],
        b: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        first = 0
        for one_a, one_b, width in zip(a, b, output_slices, strict=True):
            _add_terms(y[:, first : first + width], x, one_a, one_b, scale, tokens.groups)
            first += width

    punica.update_metadata, punica.add_lora_linear = update_metadata, add_lora_linear


def _groups(slots: Tensor) -> Groups:
    """Rows by slot; those of the base model, -1, are in none.

    Args:
        slots: int64 [rows].
    """
    found = slots.unique().tolist()
    if len(found) == 1:
        return [(found[0], None)] if found[0] >= 0 else []
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in found if slot >= 0]


def _add_terms(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, groups: Groups) -> None:
    """Add scale B A x to each row of y, with its own adapter's A and B.

    Args:
        y: [rows, out], changed in place; beyond the matrices' own width it has columns of padding.
        x: [rows, in].
        a: [slots, 1, rank, in].
        b: [slots, 1, out, rank].
    """
    width = min(y.shape[1], b.shape[2])
    for slot, rows in groups:
        inner = functional.linear(x if rows is None else x[rows], a[slot, 0])
        term = functional.linear(inner, b[slot, 0, :width]).to(y.dtype)
        if rows is None:
            y[: len(term), :width].add_(term, alpha=scale)
        else:
            y[:, :width].index_add_(0, rows, term, alpha=scale)


# ---------------------------------------------------------------- linear attention on a CPU

_LINEAR_ATTENTION = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"


def _change_convolution() -> None:
    """See 4; a model without linear attention has not imported it."""
    module = sys.modules.get(_LINEAR_ATTENTION)
    if module is None:
        return
    convolve = vars(module)["_causal_conv1d_fwd_cpu"]

    def with_own_strides(*, x: Tensor, **more: Any) -> Tensor:
        """`x`: [channels, tokens]. The kernel looks at the strides of a single token too, where they mean nothing."""
        if x.shape[1] == 1:
            x = x.as_strided(x.shape, (1, len(x)))
        return convolve(x=x, **more)

    vars(module)["_causal_conv1d_fwd_cpu"] = with_own_strides
