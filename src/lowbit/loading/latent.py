"""The up projection of latent attention, as folders have it and as GGUF files do.

    folder   kv_b_proj (heads x (nope + v), rank): in each head the rows of K above those of V
    GGUF     k_b_proj (heads, rank, nope): K's rows, transposed in each head; v_b_proj (heads, v, rank)

V's rows keep their form. K's half has its columns along the other axis: what shared a scale there does not
here, so that it is written as plain floats that hold every number exactly (``exact_dtype``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.dense_writer import FLOATS, exact_dtype
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense


@dataclass(frozen=True)
class Latent:
    """Sizes of a kv_b_proj. ``half``: "k" or "v" of it as GGUF files have it, "" the whole."""

    heads: int
    rank: int
    nope: int
    v: int
    half: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the heads of a half one below another."""
        if self.half == "k":
            return self.heads * self.rank, self.nope
        return self.heads * (self.v if self.half else self.nope + self.v), self.rank

    @property
    def rows(self) -> Tensor:
        """int64: which rows of the whole a half is made of, before K's are transposed."""
        whole = torch.arange(self.heads * (self.nope + self.v)).view(self.heads, -1)
        return (whole[:, : self.nope] if self.half == "k" else whole[:, self.nope :]).flatten()

    def scheme_of(self, scheme: Scheme) -> Scheme:
        """A half of a whole of this scheme."""
        kept = self.half == "v" and scheme.rows_move
        return scheme if kept else dense(exact_dtype(scheme))

    def cut(self, weight: QuantizedTensor, multiplier: Tensor | None) -> QuantizedTensor:
        """A half of the whole. ``multiplier`` (rank,), of what it is multiplied with, goes into K's."""
        scheme = self.scheme_of(weight.scheme)
        if scheme == weight.scheme and self.half == "v":
            return weight.permute_rows(self.rows)
        values = weight.dequantize()[self.rows]
        if self.half == "k":
            values = values if multiplier is None else values * multiplier.float()
            values = values.view(self.heads, self.nope, self.rank).transpose(1, 2).reshape(self.shape)
        return _plain(values, scheme if multiplier is None else dense("f32"), weight)


def joined(heads: Sequence[QuantizedTensor], scheme: Scheme) -> QuantizedTensor:
    """The whole, of the plain ``scheme``: from K's matrix of every head (rank, nope), then V's (v, rank)."""
    count = len(heads) // 2
    pairs = zip(heads[:count], heads[count:], strict=True)
    whole = torch.cat([torch.cat([k.dequantize().T, v.dequantize()]) for k, v in pairs])
    return _plain(whole, scheme, heads[0])


def _plain(values: Tensor, scheme: Scheme, origin: QuantizedTensor) -> QuantizedTensor:
    codes = values.to(FLOATS[scheme.weight.name]).contiguous()
    return replace(QuantizedTensor(scheme, (values.shape[0], values.shape[1]), codes), origin=origin.origin)


def scheme_of_joined(schemes: Sequence[Scheme]) -> Scheme:
    """The plain scheme that holds halves of these."""
    names = {exact_dtype(scheme) for scheme in schemes}
    return dense(names.pop() if len(names) == 1 else "f32")
