"""What a layer gives, rounded to 8 bits under a static scale (quanto), in place: by the codes of its inputs.

y becomes Q(y / scale) * scale, bias and all. Codes and the product with the scale are those of
``activation_quant`` and ``elementwise``, so that steps replay them and a GPU has kernels for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.elementwise import affine
from lowbit.kernels.rotation import Rotator


@dataclass(frozen=True, eq=False)
class RoundedOutput:
    """``codes``: of a static scheme, one scale for all."""

    codes: InputTransform

    def in_place(self, x: Tensor) -> None:
        """x (tokens, width), perhaps some columns of a wider matrix."""
        assert self.codes.is_static, "dynamic scales would depend on how a layer's parts are fused"
        changed, factor = self.codes(x)
        affine(changed.to(x.dtype), factor=factor, out=x)

    def same_as(self, other: RoundedOutput) -> bool:
        """Whether both do the same to every x."""
        return self is other or self.codes.same_as(other.codes)


OutputTransform = Rotator | RoundedOutput


def same_output(a: OutputTransform | None, b: OutputTransform | None) -> bool:
    """Whether both do the same, or neither does anything."""
    if isinstance(a, Rotator) and isinstance(b, Rotator):
        return a.same_as(b)
    if isinstance(a, RoundedOutput) and isinstance(b, RoundedOutput):
        return a.same_as(b)
    return a is b
