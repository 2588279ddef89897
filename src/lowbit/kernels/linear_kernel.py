"""The contract of a linear kernel: one file a packed layout.

A kernel says why it cannot run a scheme (``refuses``), turns the canonical weight into its own buffers
(``pack``), back (``unpack``) and multiplies (``linear``). Formats and kernels never meet: the only thing
between them is ``QuantizedTensor``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


@dataclass(frozen=True)
class PackedWeight:
    """A weight as one kernel wants it: opaque to everything but that kernel. ``shape``: (out, in).

    ``inputs``: the one type that x has, None where any float does.
    """

    kernel: LinearKernel
    scheme: Scheme
    shape: tuple[int, ...]
    buffers: dict[str, Tensor] = field(repr=False)
    origin: str = ""
    inputs: torch.dtype | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes the weight occupies."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True)
class Use:
    """What is to be done with a weight. ``lookup``: its rows are read, too (an embedding).

    ``inputs``: the type of x, None where it is not known.
    """

    lookup: bool = False
    inputs: torch.dtype | None = None


ANY_USE = Use()


class LinearKernel(Protocol):
    """One packed layout and everything that is done with it."""

    name: str
    computes: str  # "as stored", or the activation quantization the kernel imposes
    layout: int  # a new number whenever packed bytes mean something else: they are kept on disk
    steady: bool  # whether a row's bits never depend on the rows beside it
    runs: str  # the weights it is for: "quantized", "unquantized" or "any"

    def serves(self, device: torch.device) -> bool:
        """Whether it is for devices of this kind: of others it is not even said why it refuses them."""

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """The reason this kernel cannot run it ("needs in % 64 == 0, got 100"), or None."""

    def rounds(self, scheme: Scheme) -> bool:
        """Whether the numbers it multiplies may be other than the stored ones."""

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of a weight it does not refuse, packed; tables and orders not counted."""

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Whether a weight it does not refuse can meet int8 inputs (``numerics.int8_inputs``)."""

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The kernel's own buffers; ``weight`` may be dropped afterwards."""

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """``pack``'s result again, around the buffers it had; they may be mapped and read-only.

        ValueError where they cannot be buffers of such a weight.
        """

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The canonical weight again: ``unpack(pack(w)) == w``; as it was rounded, where it was."""

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) @ weight.T -> (tokens, out). A row's result does not depend on other rows.

        On CPU ``x`` and the result are float32; on CUDA both have the model's dtype.
        """

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in): dequantized weight rows, the embedding lookup."""


@runtime_checkable
class ParticularKernel(Protocol):
    """What else a linear kernel has that is not for every use of a weight, or works only where tried."""

    looks_up: bool  # whether there is ``rows``

    def unfit(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device, use: Use) -> str | None:
        """Why the kernel cannot serve a weight that it does not refuse, or None; it may be tried to know."""
