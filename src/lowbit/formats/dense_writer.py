"""Plain checkpoints: every module as the matrix its numbers stand for, in one float type.

float32 holds what ``QuantizedTensor.dequantize`` says, which is the definition of every scheme; bf16 and f16
are exact for few (``exact_dtype``), and how far they are off is counted. An input multiplier (AWQ's, kept
apart by ModelOpt) goes into the columns; quantized inputs have no place in a plain model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import CheckpointWriter
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_CHUNK = 1 << 24  # weights dequantized at a time
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def exact_dtype(scheme: Scheme) -> str:
    """The narrowest float type that holds every weight of the scheme, judged without its data.

    bf16 holds the codes of few bits under scales that are powers of two (MX formats); nearly everything else
    is a product of more bits than 16-bit floats have.
    """
    if scheme.is_dense:
        return scheme.weight.name
    if scheme.weight.trellis is not None or scheme.weight.lattice is not None:
        return "f16"
    powers = all(scale.name == "e8m0" for scale in scheme.scales)
    few = scheme.weight.name in ("gguf_mxfp4", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int4", "int8")
    if few and powers and not scheme.offset and scheme.zero == "none":
        return "bf16"
    return "f32"


class DenseWriter(CheckpointWriter):
    """``dtype``: bf16, f16 or f32.

    ``exact``: nothing may be rounded, as the type was chosen for the matrices; a bias of a wider type stays
    in it unless the narrower one says the same.
    """

    name = "dense"
    writes = "f32, f16, bf16"
    stacks = True

    def __init__(self, schemes: Mapping[str, Scheme], dtype: str = "f32", *, exact: bool = False) -> None:
        super().__init__(schemes)
        self.dtype = dtype
        self.exact = exact

    @property
    def rounding(self) -> float:
        """The largest relative change so far."""
        return self.learned.get("rounding", 0.0)

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Nothing: every scheme means floats."""
        return None

    def write(
        self,
        module: StoredModule,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        input: InputRule | None = None,
    ) -> dict[str, Tensor]:
        """``weight``, and ``bias`` where there is one."""
        multiplier = None if input is None else input.multiplier
        matrix = self._matrix(module, weight, multiplier)
        found = {module.tensor("weight"): matrix.T.contiguous() if module.transposed else matrix}
        if bias is not None:
            narrow = self.narrowed(bias)
            found[module.tensor("bias")] = narrow if self.exact else self.cast(bias, module.name)
        return found

    def narrowed(self, exact: Tensor) -> Tensor:
        """In the writer's type where that loses nothing, else as it is."""
        narrow = exact.to(FLOATS[self.dtype])
        return narrow if torch.equal(narrow.float(), exact.float()) else exact

    def cast(self, exact: Tensor, name: str) -> Tensor:
        """In the writer's type, the change counted."""
        wanted = FLOATS[self.dtype]
        if exact.dtype == wanted:
            return exact
        exact = exact.float()
        rounded = exact.to(wanted)
        if wanted != torch.float32 and exact.numel():
            if not bool(rounded.isfinite().all()) and bool(exact.isfinite().all()):
                raise LowbitError(
                    "E0450",
                    f"--dtype {self.dtype}: {name} has numbers up to {float(exact.abs().max()):.3g}, which "
                    "it cannot hold; use bf16 or f32",
                )
            # Of the number itself, but for those so small that float16 keeps no digits of them.
            step = (rounded.float() - exact).abs() / exact.abs().clamp(min=torch.finfo(wanted).tiny)
            self.learned["rounding"] = max(self.rounding, float(step.max()))
        return rounded

    def _matrix(self, module: StoredModule, weight: QuantizedTensor, multiplier: Tensor | None) -> Tensor:
        if weight.scheme.is_dense and multiplier is None:
            return self.cast(weight.codes, module.name)
        out, columns = weight.shape[-2:]
        made = torch.empty(out, columns, dtype=FLOATS[self.dtype])
        step = row_step(weight.scheme, columns)
        step *= max(1, _CHUNK // (step * columns))
        for start in range(0, out, step):
            exact = weight.rows(start, min(out, start + step), ragged=True).dequantize()
            if multiplier is not None:
                exact = exact * multiplier.float()
            made[start : start + step] = self.cast(exact, module.name)
        return made


def row_step(scheme: Scheme, columns: int) -> int:
    """The fewest rows that end on a border of every block."""
    if scheme.flattened:
        block = scheme.blocks[0][1]
        return block // math.gcd(block, columns)
    return math.lcm(*(rows or 1 for rows in scheme.heights))


WRITERS = (DenseWriter,)
