"""Data-parallel ranks: each has the whole base and all adapters' weights, and computes its own rows.

An adapter's gradient and moments are only on its owner, so they take memory once, not once per rank. At the end of a
pass the gradients of its rows are sent to the owner, which makes the steps and sends the new weights to the others.

All methods are collective: every rank calls the same ones in the same order.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from twinkle.server.backends.lora.banks import Adapter
from twinkle.server.backends.lora.scratch import BankScratch
from twinkle.server.backends.meeting import meet
from twinkle.server.backends.protocol import ModelConfig

T = TypeVar("T")

# A rank that waits this long for another has lost it.
_TIMEOUT = timedelta(minutes=10)


class Replicas:
    """The ranks, and which of them this one is.

    Attributes:
        bytes_sent: of gradients, by this rank, so far; weight_bytes_sent: of new weights, to each other rank.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """Meet the other ranks, once per process: waits until all are there."""
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            meet(config, "gloo" if device.type == "cpu" else "nccl", _TIMEOUT)
        world = dist.group.WORLD
        assert world is not None, "init_process_group made it"
        # Python objects travel through the host.
        is_cpu = device.type == "cpu"
        self._control = (
            world if is_cpu else cast(ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
        )
        self.index, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = self.weight_bytes_sent = 0
        self._owned = [0] * self.size  # elements of the adapters that each rank owns

    # ------------------------------------------------------------ owners

    def choose_owner(self, size: int) -> int:
        """The rank with the fewest owned elements, for a new adapter of `size`."""
        owner = min(range(self.size), key=self._owned.__getitem__)
        self._owned[owner] += size
        return owner

    def release(self, owner: int, size: int) -> None:
        """An adapter was removed."""
        self._owned[owner] -= size

    # ------------------------------------------------------------ exchanges

    def gather(self, own: T | Exception) -> list[T]:
        """Each rank's `own`, by rank.

        Raises:
            Exception: on all ranks, that of the first rank which has one.
        """
        told: list[Any] = [None] * self.size
        dist.all_gather_object(
            told, _portable(own) if isinstance(own, Exception) else own, group=self._control
        )
        for one in told:
            if isinstance(one, Exception):
                raise one
        return told

    def send_to_owners(
        self, scratches: Sequence[BankScratch], adapters: dict[str, Adapter], trained: Sequence[set[str]]
    ) -> list[BankScratch]:
        """Add up each adapter's gradients on its owner; they are sent by the ranks that have any.

        Args:
            scratches: this rank's, from a pass.
            trained: by rank, the adapters with gradients in its scratches.

        Returns:
            Scratches with the gradients of the adapters owned by this rank, including those from other ranks.
        """
        own = {key: adapters[key] for key in sorted(trained[self.index])}
        sent, received = list[Tensor](), list[tuple[Adapter, Tensor]]()
        transfers: list[Any] = []
        for rank in range(self.size):  # between two ranks in the same order on both
            if rank == self.index:
                continue
            for adapter in own.values():
                if adapter.owner == rank:
                    sent.append(_total([scratch for scratch in scratches if scratch.has(adapter)], adapter))
                    transfers.append(dist.P2POp(dist.isend, sent[-1], rank))
            for key in sorted(trained[rank]):
                adapter = adapters[key]
                if adapter.owner == self.index:
                    received.append(
                        (adapter, torch.empty(adapter.bank.layout.size, device=adapter.bank.device))
                    )
                    transfers.append(dist.P2POp(dist.irecv, received[-1][1], rank))
        self.bytes_sent += sum(row.nbytes for row in sent)
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        found = list(scratches)
        for adapter, gradient in received:
            scratch = next((each for each in found if each.has(adapter)), None)
            if scratch is None:
                scratch = BankScratch(adapter.bank, [adapter], keeps_gradients=True)
                found.append(scratch)
            scratch.gradient(adapter).add_(gradient)
        return found

    def share_weights(self, stepped: Sequence[Adapter]) -> None:
        """Send each owner's new weights to all ranks."""
        rows = [(adapter.bank.params[adapter.slot], adapter.owner) for adapter in stepped]
        self.weight_bytes_sent += sum(
            row.nbytes * (self.size - 1) for row, owner in rows if owner == self.index
        )
        for sending in [dist.broadcast(row, src=owner, async_op=True) for row, owner in rows]:
            cast(Any, sending).wait()

    def send_to_first(self, owner: int, rows: Sequence[Tensor]) -> None:
        """Send the owner's `rows` to rank 0, which passes tensors of their shapes to be filled; others pass any."""
        if owner == 0:
            return
        for row in rows:
            if self.index == owner:
                dist.send(row.contiguous(), dst=0)
            elif self.index == 0:
                dist.recv(row, src=owner)


def _total(scratches: Sequence[BankScratch], adapter: Adapter) -> Tensor:
    """The sum of an adapter's gradients in these scratches (at least one); float32 [size]."""
    first, *others = [scratch.gradient(adapter) for scratch in scratches]
    return sum(others, first) if others else first


def _portable(error: Exception) -> Exception:
    """The error, or an equivalent one that can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its own methods may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
