"""A frozen linear layer with something around it, and how it is put into a model. Trainer and sampler build on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


class WrappedLinear(nn.Module):
    """Holds the base layer, and shows its weight and bias to models that look at them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def wrap_linears(model: nn.Module, names: Iterable[str], wrap: Callable[[nn.Linear, str], nn.Module]) -> None:
    """Put `wrap(layer, name)` in place of each linear layer named."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, child)
        assert isinstance(base, nn.Linear)
        setattr(parent, child, wrap(base, name))
