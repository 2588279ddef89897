"""Parallel: the ranks that share a model's layers (tensor parallelism), and what they tell each other.

Megatron-LM (Shoeybi et al., 2019): a projection cut in rows is followed by one cut in columns, whose
partial sums the ranks add up. Sums are float32 and in the order of the ranks, so that an element's bits
depend neither on where it lies in a tensor nor on how many there are: a ring adds in an order that changes
with both, and a token's result would depend on its batch. Every rank gets the same bits.

A group talks through torch.distributed's backends (gloo on CPUs, NCCL on GPUs) without its process-wide
state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import LowbitError

# From so many elements on, more than two ranks add up a share each and exchange the sums: less to send, but
# twice. The bits are the same.
_SHARED_SUM = 1 << 15


@dataclass(frozen=True)
class Parallel:
    """Rank ``rank`` of ``size``. Without a group nothing can be exchanged: a model is only planned."""

    rank: int = 0
    size: int = 1
    _group: Any = field(default=None, repr=False, compare=False)

    @staticmethod
    def join(
        rank: int, size: int, store: Path, device: torch.device, meeting: float, seconds: float
    ) -> Parallel:
        """Meet the other ranks over the file ``store``, which all of them name, within ``meeting`` seconds;
        E0713 where they do not come. No call waits longer than ``seconds`` for another rank: then it is a
        RuntimeError."""
        from torch import distributed

        if not distributed.is_available():
            raise LowbitError("E0713", "this torch was built without torch.distributed; use --tp-size 1")
        timeout = timedelta(seconds=seconds)
        try:
            met = distributed.FileStore(str(store), size)
            met.set_timeout(timedelta(seconds=meeting))
            if device.type == "cuda":
                nccl: Any = distributed.ProcessGroupNCCL
                options = nccl.Options()
                options._timeout = timeout
                return Parallel(rank, size, nccl(met, rank, size, options))
            gloo: Any = distributed.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            return Parallel(rank, size, gloo(met, rank, size, options))
        except RuntimeError as error:
            raise LowbitError("E0713", f"rank {rank} of {size} found no others: {error}") from None

    def gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the x of every rank, all of one shape."""
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._group._allgather_base(out, x).wait()
        return out.view(self.size, *x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """float32: the sum of every rank's x, in the order of the ranks."""
        x = x.float()
        if self.size == 1 or not x.numel():
            return x
        if self.size > 2 and x.numel() >= _SHARED_SUM:
            flat = functional.pad(x.flatten(), (0, -x.numel() % self.size))
            received = torch.empty_like(flat)
            self._group.alltoall_base(received, flat, [], []).wait()
            share = _added(received.view(self.size, -1))
            return self.gather(share).flatten()[: x.numel()].view(x.shape)
        return _added(self.gather(x))

    def largest(self, x: Tensor) -> Tensor:
        """The largest of every rank's x, element by element; NaN counts as the largest."""
        return x if self.size == 1 or not x.numel() else self.gather(x).amax(0)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, written into everybody's."""
        from torch import distributed

        options = distributed.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([x], options).wait()
        return x

    def columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """(tokens, sum of widths): the columns of all ranks beside each other; x (tokens, widths[rank])."""
        if self.size == 1:
            return x
        most = max(widths)
        parts = self.gather(functional.pad(x, (0, most - x.shape[1])))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def close(self) -> None:
        """Leave the group; what waits for this rank elsewhere fails."""
        if self._group is not None:
            self._group.abort()


def _added(parts: Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


ALONE = Parallel()


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for ``join``'s store that no other user can write to."""
    return tempfile.TemporaryDirectory(prefix="lowbit-ranks-", ignore_cleanup_errors=True)
