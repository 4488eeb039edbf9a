"""What runs: the samples with rows in the batch, and the prompts being prefilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from torch import Tensor

from twinkle.server.samplers.cache_usage import CacheUsage
from twinkle.server.samplers.preemption import Slot
from twinkle.server.samplers.transformers.batches import Batch
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.model_runner import Prompt
from twinkle.server.samplers.transformers.sequences import Item, Sequence, Task, task_of

# Sequences, and the logits [sequences, vocabulary] of their next tokens.
Drawable: TypeAlias = tuple[tuple[Sequence, ...], Tensor]


class RunningSamples:
    """The batch, and the owners of its rows.

    Attributes:
        sequences: row i of the batch is the i-th.
        prefilling: prompts on their way into the batch, with their items.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.sequences: tuple[Sequence, ...] = ()
        self.prefilling: dict[Prompt, Item] = {}

    def __bool__(self) -> bool:
        return bool(self.sequences or self.prefilling)

    @property
    def tasks(self) -> set[Task]:
        return {*(sequence.task for sequence in self.sequences), *map(task_of, self.prefilling.values())}

    @property
    def slots(self) -> list[Slot]:
        """The batch's rows in order, then the samples being prefilled."""
        slots = [Slot(s.task.request.tenant, s.order, s.length) for s in self.sequences]
        for prompt, item in self.prefilling.items():
            order = item.order if isinstance(item, Sequence) else (item.number, item.admitted)
            slots += [Slot(prompt.tenant, order, len(prompt.tokens), can_preempt=False)] * prompt.rows
        return slots

    @property
    def usage(self) -> CacheUsage:
        return CacheUsage.of(self.batch.limits, (slot.length for slot in self.slots))

    @property
    def outgrows_memory(self) -> bool:
        """Whether the next decode step would take more memory than there is."""
        limits = self.batch.limits
        if not self.prefilling and self.batch.rows * limits.cost.tokens(self.batch.longest) <= limits.tokens:
            return False  # nearly always; exact counts take longer
        return self.usage.is_too_much

    def admit(self, prompts: Mapping[Prompt, Item]) -> None:
        """Prefill these from now on."""
        self.prefilling |= prompts
        self.batch.add(list(prompts))

    def prefill(self) -> Drawable | None:
        """Prefill a chunk; returns the sequences that begin with it, if any, and their logits."""
        prompts, logits = self.batch.prefill()
        return (self._begin(prompts), logits) if prompts else None

    def prefill_whole(self, prompt: Prompt, item: Item) -> Drawable:
        """Prefill the only prompt to its end."""
        self.admit({prompt: item})
        while (begun := self.prefill()) is None:
            pass
        return begun

    def _begin(self, prompts: list[Prompt]) -> tuple[Sequence, ...]:
        """Sequences for the rows just added, prompt by prompt."""
        begun: list[Sequence] = []
        for prompt in prompts:
            item = self.prefilling.pop(prompt)
            if isinstance(item, Sequence):
                begun.append(item)  # it goes on after a preemption
                continue
            item.note_prompt(prompt)
            for _ in range(prompt.rows):
                begun.append(Sequence(item, item.admitted, Uniforms(item.seed, item.admitted)))
                item.admitted += 1
        self.sequences += tuple(begun)
        return tuple(begun)

    def recompute_stale(self) -> None:
        """Prefill from their beginnings the sequences whose cached keys and values don't fit their next tokens."""
        stale = [self.sequences[row] for row in self.batch.stale_rows()]
        if stale:
            self.drop(set(stale), cacheable=False)
            self.admit({sequence.recompute_prompt(): sequence for sequence in stale})

    def cancel_prefill(self, is_meant: Callable[[Item], bool]) -> None:
        prompts = {prompt for prompt, item in self.prefilling.items() if is_meant(item)}
        if prompts:
            self.batch.cancel_prefill(prompts)
            self.prefilling = {p: item for p, item in self.prefilling.items() if p not in prompts}

    def drop(self, sequences: AbstractSet[Sequence], cacheable: bool) -> None:
        """Remove sequences.

        Args:
            cacheable: whether their keys and values may be kept for later prompts with the same beginning.
        """
        rows = [row for row, sequence in enumerate(self.sequences) if sequence in sequences]
        if rows:
            self.sequences = tuple(self.sequences[old] for old in self.batch.drop(rows, cacheable))

    def start_over(self, make_batch: Callable[[], Batch]) -> None:
        """Forget everything, with a new batch."""
        self.sequences, self.prefilling = (), {}
        self.batch = make_batch()
