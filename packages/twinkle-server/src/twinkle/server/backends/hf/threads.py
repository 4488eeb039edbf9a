"""How many threads torch uses for a computation on a CPU: for a small one, waking more costs more than it saves."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Multiplications of weights with tokens in a forward pass that are worth a thread. On two cores a second thread begins
# to pay between 64 and 128 million with 2 layers of hidden size 64, and at 135 million with SmolLM2-135M.
_ENOUGH = 64_000_000


class Threads:
    """Sets torch's intra-op threads by the size of the next computation; on a GPU always one."""

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None) -> None:
        """
        Args:
            device: where it computes; default: where its weights are.
        """
        self._weights = matrix_weights(model)
        self._most = torch.get_num_threads() if (device or model.device).type == "cpu" else 1

    @property
    def most(self) -> int:
        return self._most

    def worth(self, tokens: int) -> int:
        """How many threads pay off in a forward pass of this many tokens."""
        return max(1, min(self._most, tokens * self._weights // _ENOUGH))

    def fit(self, tokens: int, shared_by: int = 1) -> None:
        """Set torch's threads for a forward pass of this many tokens, one of `shared_by` that run at the same time."""
        if self._most > 1:
            torch.set_num_threads(max(1, min(self._most // shared_by, self.worth(tokens))))

    def restore(self) -> None:
        """Use all threads again."""
        if self._most > 1:
            torch.set_num_threads(self._most)


def matrix_weights(model: PreTrainedModel) -> int:
    """Number of elements in all matrices that a token is multiplied with.

    Embedding look-ups cost nothing; the head is a matrix product, whether it shares the embedding's weights or not.
    """
    embedding = cast("Tensor", model.get_input_embeddings().weight)
    head = cast("Tensor", cast("nn.Module", model.get_output_embeddings()).weight)
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding.numel()
    return weights + (head.numel() if head is embedding else 0)
