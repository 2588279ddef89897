"""GPTQModel's ``rotation``: weights of a model that was rotated first (QuaRot; Ashkboos et al., 2024).

All of it is part of the weights, embeddings and head included ("hadamard" and "random" say how they were
rotated), but for what the inputs of ``mlp.down_proj`` are multiplied by at run time, as no weight comes just
before them: H x / sqrt(n) for n = K 2^k inputs, with H = H_K (x) H_2 (x) … (x) H_2 (``numerics.hadamard``).
The file holds no matrix. K is the first of ``_HEADS`` that divides n and has to leave a power of two.

Checked against gptqmodel 7.3.4 for every n up to 4,096.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.formats import StoredModule
from lowbit.formats.quantization_config import QuantizationConfig
from lowbit.numerics.hadamard import hadamard_head
from lowbit.numerics.rotation import Rotation, sylvester

_MODULE = ".mlp.down_proj"
_HEADS = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12, 1)
_WAY_OUT = "use a version that was quantized without"


def asks_for_rotation(header: CheckpointHeader, found: QuantizationConfig) -> bool:
    """Whether inputs are rotated; E0218 where GPTQModel would not do it, or is not known to."""
    kind, place = found.values.get("rotation"), f"{found.place}.rotation"
    if not kind:
        return False
    if kind not in ("hadamard", "random"):
        raise LowbitError(
            "E0218", f"{place} is {printable(repr(kind))}; 'hadamard' and 'random' are read. Else {_WAY_OUT}"
        )
    plain = next((name for name in header.tensors if name.endswith(f"{_MODULE}.weight")), None)
    if plain is not None:
        raise LowbitError(
            "E0218",
            f"{header.file_of(plain)}: {plain!r} is plain, and {place} rotates the inputs of quantized "
            f"modules alone; {_WAY_OUT}",
        )
    return True


def is_rotated(module: StoredModule, place: str) -> bool:
    """Whether it is of this module's inputs; E0218 where GPTQModel has no matrix for them."""
    if not module.stored.endswith(_MODULE):
        return False
    columns = module.shape[1]
    blocks = columns // _order(columns)
    if blocks & (blocks - 1):
        raise LowbitError(
            "E0218",
            f"{place}.rotation: GPTQModel has no Hadamard matrix for the {columns:,} inputs of "
            f"{module.name!r}; {_WAY_OUT}",
        )
    return True


@cache
def rotation_of(columns: int) -> Rotation:
    """What so many inputs are rotated by: one object, so that layers share it."""
    order = _order(columns)
    head = hadamard_head(order)
    if order == 40:  # H_2 (x) H_20, where it is H_20 (x) H_2 elsewhere
        twenty = hadamard_head(20)
        assert twenty is not None, "20 is no power of two"
        head = torch.kron(sylvester(2).float(), twenty)
    return Rotation(columns // order, divisor=math.sqrt(columns), head=head)


def _order(columns: int) -> int:
    return next(order for order in _HEADS if columns % order == 0)
