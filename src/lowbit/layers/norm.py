"""Norm: RMSNorm or LayerNorm with its weights, over rows or over the heads of Q and K.

The residual stream is float32 on every device; a norm gives what reads it in the dtype of its own that matrix
products take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.elementwise import HeadNorms, add, add_rms_norm, layer_norm, rms_norm, rms_norm_heads
from lowbit.kernels.parallel import ALONE, Parallel


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang and Sennrich, 2019), or where ``centred`` LayerNorm (Ba et al., 2016), which may have a
    bias. ``weight`` and ``bias``: float32 (width,). ``dtype``: of what it gives; None: as x.

    ``whole``: the width of rows of which each rank of ``parallel`` has a part, weight included (RMSNorms
    only); 0: x is all of the row. ``counts``: whether this rank's part counts, as no other has it too.
    """

    weight: Tensor
    eps: float
    centred: bool = False
    bias: Tensor | None = None
    dtype: torch.dtype | None = None
    parallel: Parallel = ALONE
    whole: int = 0
    counts: bool = True

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (tokens, width), normalized. ``out`` may be x."""
        if self.centred:
            return layer_norm(x, self.weight, self.bias, self.eps, out=out, dtype=self.dtype)
        if self.whole:
            return self._across(x, torch.empty_like(x, dtype=self.dtype) if out is None else out)
        return rms_norm(x, self.weight, self.eps, out, self.dtype)

    def _across(self, x: Tensor, out: Tensor) -> Tensor:
        """RMSNorm of rows that lie on several ranks."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        total = self.parallel.sum(squares if self.counts else torch.zeros_like(squares))
        return out.copy_(wide * torch.rsqrt(total / self.whole + self.eps) * self.weight)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual += x`` in place, then its norm."""
        if self.centred:
            return self(add(x, residual))
        return add_rms_norm(x, residual, self.weight, self.eps, self.dtype)

    def of_heads(self, heads: Tensor) -> None:
        """Heads (tokens, heads, dim) in place; they may be a view of a fused output.

        An RMSNorm as wide as one head goes over each; a wider one over all together. A LayerNorm goes over
        each, with a weight for all or one for each.
        """
        if not self.centred and not self.whole and self.weight.numel() == heads.shape[2]:
            rms_norm_heads(heads, self.weight, self.eps)
            return
        rows = heads.flatten(1)
        assert rows.data_ptr() == heads.data_ptr(), "heads lie one behind another"
        if self.centred:
            layer_norm(rows, self.weight, self.bias, self.eps, heads.shape[1], out=rows)
        else:
            self(rows, out=rows)


def head_norms(q: Norm | None, k: Norm | None, dim: int) -> HeadNorms | None:
    """Both as RMSNorms of single heads, which can go with a rotation, or None where they are no such."""
    if q is None or k is None or q.centred or k.centred or q.eps != k.eps:
        return None
    if q.whole or k.whole or q.weight.numel() != dim or k.weight.numel() != dim:
        return None
    return HeadNorms(q.weight, k.weight, q.eps)
