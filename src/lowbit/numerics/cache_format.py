"""How the numbers of a KV cache are stored: the formats of ``--kv-cache-dtype``, written out in torch.

    f32, bf16, fp16       the number, rounded to nearest even; fp16 saturates
    fp8_e4m3 (static)     number / the layer's scale, which the checkpoint brings; saturates
    fp8_e4m3 (dynamic)    code = e4m3(x / s)     s = max |x| / 448
    fp8_e5m2              code = e5m2(x / s)     s = max |x| / 57344
    int8                  code = round(x / s)    s = max |x| / 127
    int4                  code = round((x - low) / s)   low = min x   s = (max x - low) / 15

``x`` are the numbers of one token and head, of int4 a few channels of them: a scale depends on nothing but
the token it belongs to, so a token is stored alike in whatever company. ``s`` is rounded up and ``low`` down
to bfloat16, so that no code is out of reach; bfloat16 because it has float32's range: the smallest vector
keeps its digits. A number read back is ``code * s (+ low)``. bfloat16 holds the codes themselves exactly, so
native kernels multiply codes and bring in ``s`` and ``low`` afterwards, in float32. Groups that hold a NaN or
an infinity are NaN, groups of zeros are zeros.

Why int4 has an offset and its group sizes: mean KL on the embedded model against an exact cache is 0.30 with
one symmetric scale a head, 0.13 with an offset, 0.055 with an offset for every 32 channels; nearly all of it
comes from K, some channels of which are far larger than the rest after rotation (KIVI: Liu et al., 2024), so
K gets groups of 16 (0.038) and V of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_BYTES = 2  # bfloat16


class Stored(NamedTuple):
    """What a cache keeps of x (..., dim): a row of ``codes``, and ``scales`` (..., groups, parameters)."""

    codes: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class CacheFormat:
    """One row of the table above. ``reach``: the largest code of one that has scales, else 0.

    ``group``: channels that share a scale; 0: all of a head.
    """

    name: str
    bits: int
    dtype: torch.dtype  # of the codes; int4 has two in a byte
    reach: float = 0.0
    group: int = 0

    @property
    def dynamic(self) -> bool:
        """Whether scales are found when a token is written, and stored beside it."""
        return self.reach > 0

    @property
    def parameters(self) -> int:
        """Numbers a group has: a scale, of int4 also the lowest value."""
        return 2 if self.bits == 4 else 1

    def group_of(self, dim: int) -> int:
        """Channels of a vector of ``dim`` that share a scale; 0 without scales."""
        return min(self.group or dim, dim) if self.dynamic else 0

    def token_bytes(self, dim: int) -> int:
        """Bytes a vector of ``dim`` channels occupies, its scales included."""
        groups = -(-dim // self.group_of(dim)) if self.dynamic else 0
        return dim * self.bits // 8 + groups * self.parameters * SCALE_BYTES

    def refuses(self, dim: int) -> str | None:
        """Why vectors of ``dim`` channels cannot be stored, or None."""
        if self.bits == 4 and dim % 2:
            return f"int4 keeps two channels in a byte and needs an even head size, got {dim}"
        return None

    def encode(self, x: Tensor) -> Stored:
        """float (..., dim) -> what is stored of it."""
        if not self.dynamic:
            limit = torch.finfo(self.dtype).max
            saturates = self.dtype.itemsize == 1 or self.dtype is torch.float16
            return Stored((x.clamp(-limit, limit) if saturates else x).to(self.dtype), None)
        groups = _grouped(x.float(), self.group_of(x.shape[-1]))  # (..., groups, group)
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if self.bits == 4:
            low = _rounded_down(lowest)
            scale = _away_from_zero((highest - low) / 15)
        else:
            low = torch.zeros_like(lowest)
            scale = _away_from_zero(torch.maximum(-lowest, highest) / self.reach)
        scale = scale.masked_fill(~groups.isfinite().all(-1, keepdim=True), torch.nan)
        divides = (scale > 0) & scale.isfinite()
        quotients = (groups - low) / torch.where(divides, scale, 1.0)
        codes = torch.where(divides, quotients, 0.0).flatten(-2)[..., : x.shape[-1]]
        parameters = torch.cat([scale, low], -1) if self.bits == 4 else scale
        return Stored(self._code(codes), parameters.bfloat16())

    def _code(self, quotients: Tensor) -> Tensor:
        if self.bits == 4:
            codes = quotients.round().to(torch.uint8)
            return codes[..., 0::2] | codes[..., 1::2] << 4
        if self.dtype is torch.int8:
            return quotients.round().to(torch.int8)
        return quotients.clamp(-self.reach, self.reach).to(self.dtype)

    def decode(self, stored: Stored, dim: int) -> Tensor:
        """float32 (..., dim): the numbers that attention computes with."""
        if stored.scales is None:
            return stored.codes.float()
        codes = stored.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        groups = _grouped(codes.float(), self.group_of(dim))
        scales = stored.scales.float()
        numbers = groups * scales[..., :1]
        if self.bits == 4:
            numbers = numbers + scales[..., 1:]
        return numbers.flatten(-2)[..., :dim]


def _grouped(x: Tensor, group: int) -> Tensor:
    """(..., dim) as (..., groups, group); a last group that is short repeats its last channel."""
    short = -x.shape[-1] % group
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(-1, (-1, group))


def _away_from_zero(x: Tensor) -> Tensor:
    """The nearest bfloat16 number that is no smaller in magnitude, as float32."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _rounded_down(x: Tensor) -> Tensor:
    """The nearest bfloat16 number that is no larger, as float32."""
    towards_zero = (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return torch.where(x < 0, _away_from_zero(x), towards_zero)


def _formats(int4_group: int) -> dict[str, CacheFormat]:
    listed = [
        CacheFormat("bf16", 16, torch.bfloat16),
        CacheFormat("fp16", 16, torch.float16),
        CacheFormat("f32", 32, torch.float32),
        CacheFormat("fp8_e4m3", 8, torch.float8_e4m3fn, 448.0),
        CacheFormat("fp8_e5m2", 8, torch.float8_e5m2, 57344.0),
        CacheFormat("int8", 8, torch.int8, 127.0),
        CacheFormat("int4", 4, torch.uint8, 15.0, int4_group),
    ]
    return {cache_format.name: cache_format for cache_format in listed}


K_FORMATS, V_FORMATS = _formats(16), _formats(64)
STATIC_E4M3 = CacheFormat("fp8_e4m3", 8, torch.float8_e4m3fn)  # divided by the layer's scale beforehand


@dataclass(frozen=True)
class KvDtype:
    """How K and how V are stored. Of a latent cache (MLA), whose values are part of its keys, K's counts."""

    k: CacheFormat
    v: CacheFormat

    @classmethod
    def of(cls, k: str, v: str = "") -> KvDtype:
        """By the names of ``--kv-cache-dtype``; v as k unless it is named."""
        return cls(K_FORMATS[k], V_FORMATS[v or k])

    def __str__(self) -> str:
        return self.k.name if self.k.name == self.v.name else f"{self.k.name} for K, {self.v.name} for V"

    @property
    def takes_scales(self) -> bool:
        """Whether K or V is e4m3, for which checkpoints bring scales."""
        return "fp8_e4m3" in (self.k.name, self.v.name)

    def with_static_scales(self) -> KvDtype:
        """e4m3 divided by a layer's known scales instead of each token's own."""
        return KvDtype(*(STATIC_E4M3 if one.name == "fp8_e4m3" else one for one in (self.k, self.v)))
