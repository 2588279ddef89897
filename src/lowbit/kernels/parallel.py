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
from lowbit.kernels.gpu import runtime

# From so many elements on, more than two ranks add up a share each and exchange the sums: less to send, but
# twice. The bits are the same. Between GPUs a megabyte takes no longer than to begin.
_SHARED_SUM = 1 << 15
_SHARED_SUM_OF_GPUS = 1 << 18


@dataclass(eq=False)
class _Group:
    """A torch.distributed group, or none any more. ``whole``: recorded behind the last step that all began
    after it."""

    device: torch.device
    seconds: float
    now: Any
    whole: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Parallel:
    """Rank ``rank`` of ``size``. Without a group nothing can be exchanged: a model is only planned.

    All that is exchanged inside a forward pass may be recorded in a CUDA graph: tensors allocated there,
    sizes that follow from shapes, nothing that waits for the device. Where it is replayed, all ranks have to
    replay it.
    """

    rank: int = 0
    size: int = 1
    _group: _Group | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def join(
        rank: int, size: int, store: Path, device: torch.device, meeting: float, seconds: float
    ) -> Parallel:
        """Meet the other ranks over the file ``store``, which all of them name, within ``meeting`` seconds;
        E0713 where they do not come. No call waits longer than ``seconds`` for another rank: then it is a
        RuntimeError."""
        parallel = Parallel(rank, size, _Group(device, seconds, None))
        parallel.rejoin(store, meeting)
        return parallel

    def rejoin(self, store: Path, meeting: float) -> None:
        """Meet them again, once all have left; ``store`` is a new file. What holds this Parallel goes on."""
        group = self._group
        assert group is not None and group.now is None, "joined once, and left"
        group.now = _met(self.rank, self.size, store, group.device, meeting, group.seconds)

    def leave(self) -> None:
        """Out of a step that cannot be finished: what waits for this rank elsewhere fails, or is dropped.

        Steps before it stay whole, though the device may still be at them: they are waited for.
        """
        group = self._group
        if group is not None and group.now is not None:
            if group.whole is not None:
                group.whole.synchronize()
            left, group.now = group.now, None
            left.abort()

    def begin_step(self) -> None:
        """All that was exchanged before is on its way on every rank, and will be done."""
        group = self._group
        if group is not None and group.device.type == "cuda":
            group.whole = group.whole or torch.cuda.Event()
            group.whole.record()

    @property
    def _exchange(self) -> Any:
        if self._group is None or self._group.now is None:
            raise RuntimeError(f"rank {self.rank} of {self.size} is in no group")
        return self._group.now

    def gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the x of every rank, all of one shape."""
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._exchange._allgather_base(out, x).wait()
        return out.view(self.size, *x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """float32: the sum of every rank's x, in the order of the ranks."""
        x = x.float()
        if self.size == 1 or not x.numel():
            return x
        if self.size > 2 and x.numel() >= (_SHARED_SUM_OF_GPUS if x.is_cuda else _SHARED_SUM):
            flat = functional.pad(x.flatten(), (0, -x.numel() % self.size))
            received = torch.empty_like(flat)
            self._exchange.alltoall_base(received, flat, [], []).wait()
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
        self._exchange.broadcast([x], options).wait()
        return x

    def columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """(tokens, sum of widths): the columns of all ranks beside each other; x (tokens, widths[rank])."""
        if self.size == 1:
            return x
        most = max(widths)
        parts = self.gather(functional.pad(x, (0, most - x.shape[1])))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def close(self) -> None:
        """Leave the group at once; what waits for this rank elsewhere fails."""
        group = self._group
        if group is not None and group.now is not None:
            left, group.now = group.now, None
            left.abort()


def _met(rank: int, size: int, store: Path, device: torch.device, meeting: float, seconds: float) -> Any:
    """A new group of all ranks; see ``Parallel.join``."""
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
            return nccl(met, rank, size, options)
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        return gloo(met, rank, size, options)
    except RuntimeError as error:
        raise LowbitError("E0713", f"rank {rank} of {size} found no others: {error}") from None


def _added(parts: Tensor) -> Tensor:
    if runtime.runs_on(parts.device):
        from lowbit.kernels.gpu.gpu_kernel import add

        found = parts.new_empty(parts.shape[1:])
        rows = found.view(-1, found.shape[-1])
        add(parts.view(len(parts), *rows.shape), rows)  # one launch
        return found
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


ALONE = Parallel()


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for ``join``'s store that no other user can write to."""
    return tempfile.TemporaryDirectory(prefix="lowbit-ranks-", ignore_cleanup_errors=True)
