"""Double quantization of 4-bit scales (QLoRA: Dettmers et al., 2023, section 3): the scales quantized again.

    scale[j] = table[code[j]] * step[j // 256] + offset

The offset is the scales' mean, the step a block's largest distance from it, and the table the *dynamic tree*
of 8 bits ("8-bit Approximations for Parallelism in Deep Learning", Dettmers, 2015): a sign, an exponent of
ten in leading zeros, and a linear fraction in the bits that are left. ``values`` computes in float32 in the
tool's own order, so that they are the numbers bitsandbytes will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256


@cache
def dynamic_table() -> Tensor:
    """float32 (256,): ascending, 0 and 1 among them."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float32)
        middles = (borders[:-1] + borders[1:]) / 2
        steps = (10 ** (exponent - 6) * middles).tolist()
        values += steps + [-step for step in steps]
    return torch.tensor(sorted(values))


@dataclass(frozen=True)
class NestedScales:
    """``codes`` uint8 (blocks,), ``steps`` float32 (ceil(blocks / 256),), ``offset`` a float32."""

    codes: Tensor
    steps: Tensor
    offset: float

    @classmethod
    def of(cls, scales: Tensor) -> NestedScales:
        """Quantize float32 scales (blocks,) as the tool does, nearest table entry."""
        flat = scales.float().flatten()
        offset = flat.mean()
        centred = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        steps = centred.abs().amax(1)
        shares = centred / torch.where(steps == 0, torch.ones_like(steps), steps).unsqueeze(1)
        table = dynamic_table()
        codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
        return cls(codes.flatten()[: flat.numel()].to(torch.uint8), steps, float(offset))

    def values(self) -> Tensor:
        """float32 (blocks,): the scales they stand for."""
        steps = self.steps.repeat_interleave(BLOCK)[: self.codes.numel()]
        return dynamic_table()[self.codes.long()] * steps + torch.tensor(self.offset, dtype=torch.float32)
