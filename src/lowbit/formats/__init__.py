"""Checkpoint formats: one file each, stored tensors <-> QuantizedTensor.

A format is found by its module being here and holding ``FORMAT``. ``detect`` asks each one's ``claims``;
exactly one must answer. Formats know no model family and no kernel: ``loading`` hands them a
``StoredModule`` that says under which name and in which row order a module is stored.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


@dataclass(frozen=True)
class StoredModule:
    """One weight-bearing module as a checkpoint stores it.

    ``name``: the model's name for it (``model.layers.0.self_attn.q_proj``), for messages and ignore
    patterns. ``stored``: the prefix of its tensors (``blk.0.attn_q`` in GGUF, usually ``name``).
    ``shape``: the logical (out, in) or (experts, out, in) the model expects. ``rotary_heads``: where > 0,
    rows of each of that many heads are stored as adjacent rotary pairs and must be put back in
    half-split order (formats.md 2.7.4: GGUF llama Q/K).
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


@dataclass(frozen=True)
class InputRule:
    """What a file asks of a Linear's input, beside its weight."""

    multiplier: Tensor | None = None  # (in,) x is multiplied by this before anything else
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    norm_weight: Tensor | None = None  # (in,) RMSNorm inside the layer (BitNet)


@dataclass(frozen=True)
class StoredLinear:
    """What a reader returns: the weight, its bias (out,) and the rule for its input."""

    weight: QuantizedTensor
    bias: Tensor | None = None
    input: InputRule | None = None


class CheckpointFormat(Protocol):
    """The reading half of a format. ``name`` is its ``quant_method``; ``reference`` says who defined it."""

    name: str
    reference: str

    def claims(self, header: CheckpointHeader) -> str | None:
        """The evidence that this checkpoint is of this format, or None."""

    def scheme_of(self, header: CheckpointHeader, module: StoredModule) -> Scheme:
        """The scheme the module is stored in, from headers and config alone."""

    def tensors_of(self, header: CheckpointHeader, module: StoredModule) -> list[str]:
        """The names of every stored tensor ``read`` will use, bias included."""

    def read(self, header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
        """The module's weight in canonical form."""


@cache
def all_formats() -> tuple[CheckpointFormat, ...]:
    """Every format of this package, sorted by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))


def detect(header: CheckpointHeader) -> CheckpointFormat:
    """The one format that claims the checkpoint; none or several is an error listing the evidence."""
    claims = [(fmt, evidence) for fmt in all_formats() if (evidence := fmt.claims(header))]
    if len(claims) == 1:
        return claims[0][0]
    if not claims:
        known = ", ".join(fmt.name for fmt in all_formats())
        raise LowbitError(
            "E0211",
            f"{header.root.name}: no checkpoint format recognises this model; known: {known}",
        )
    listed = "; ".join(f"{fmt.name} ({evidence})" for fmt, evidence in claims)
    raise LowbitError(
        "E0211",
        f"{header.root.name}: several checkpoint formats claim this model: {listed}. "
        "Correct quantization_config in config.json",
    )
