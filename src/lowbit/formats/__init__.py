"""Checkpoint formats: one file each, stored tensors <-> QuantizedTensor.

A format is found by its module being here and holding ``FORMAT``, a class. ``detect`` asks each one's
``claims``; exactly one must answer. It is then opened on the header, which reads and checks the
checkpoint's quantization config once. Formats know no model family and no kernel: ``loading`` hands them a
``StoredModule`` that says under which name a module is stored.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Protocol

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class StoredModule:
    """One weight-bearing module as a checkpoint stores it.

    ``name``: the model's name for it (``model.layers.0.self_attn.q_proj``), for messages. ``stored``: the
    prefix of its tensors (``blk.0.attn_q`` in GGUF, usually ``name``); ignore lists and per-module rules
    are matched against it (``matching.py`` knows the other spellings). ``shape``: the logical (out, in)
    the model expects. ``expert``: where not None, the stored tensors hold all experts along their first
    axis and the module is this one of them (``experts`` in all); HF then writes no ``.weight``:
    ``mlp.experts.down_proj``, ``mlp.experts.down_proj_scale_inv``. ``transposed``: a plain weight
    lies as (in, out) (GPT-2), a stacked one as (experts, in, out) (gpt-oss, Llama 4). ``dotted``: the
    stack's tensors are called as those of a single module (MLX: ``mlp.switch_mlp.down_proj.scales``).
    """

    name: str
    stored: str
    shape: tuple[int, int]
    expert: int | None = None
    experts: int = 0
    transposed: bool = False
    dotted: bool = False

    def tensor(self, suffix: str) -> str:
        """The stored name of one of its tensors: ``weight``, ``bias``, ``weight_scale``, …

        ``<stored>.<suffix>``; in a stack of experts that is not dotted ``<stored>`` for the weight and
        ``<stored>_<rest>`` for what belongs to it (``weight_scale_inv`` and ``scale_inv`` both give
        ``<stored>_scale_inv``).
        """
        if self.expert is None or self.dotted:
            return f"{self.stored}.{suffix}"
        if suffix == "weight":
            return self.stored
        return f"{self.stored}_{suffix.removeprefix('weight_')}"


@dataclass(frozen=True)
class InputRule:
    """What a file's numbers ask of a Linear's input, beside the scheme's ``activation``.

    ``static_scale``: float32 scalar tensor, x is about q * static_scale (with the scheme's static
    activation); for nvfp4 activations ("local") it is the outer scale, amax / (6 * 448).
    ``static_zero``: the zero point in code units of the signed code (CT ``input_zero_point``).
    """

    multiplier: Tensor | None = None  # (in,) x is multiplied by this before anything but a rotation
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    rotation: Rotation | None = None  # x is rotated by this before anything else

    @property
    def only_rotates(self) -> bool:
        """Whether x is otherwise as it is."""
        return self.multiplier is self.static_scale is self.static_zero is None


@dataclass(frozen=True)
class StoredLinear:
    """What a reader returns: the weight, its bias (out,), the rule for its input, and what its outputs (bias
    included) are rotated by, or the scale under which they are rounded to the scheme's ``output``."""

    weight: QuantizedTensor
    bias: Tensor | None = None
    input: InputRule | None = None
    output: Rotation | None = None
    output_scale: Tensor | None = None  # float32 scalar


@dataclass
class Notes:
    """What a reader wants people to know once: contradictions between config and data, and the like.

    A contradiction the data can settle is a warning, an error under ``--strict``.
    """

    strict: bool = False
    said: dict[str, str] = field(default_factory=dict)  # code -> first message

    def contradiction(self, code: str, message: str) -> None:
        """The data win over the config: say so once for each code, or refuse."""
        if self.strict:
            raise LowbitError(code, message)
        if self.said.setdefault(code, message) is message:
            _log.warning("lowbit: warning[%s]: %s", code, message)


class CheckpointFormat(Protocol):
    """The reading half of a format, opened on one checkpoint.

    ``name`` is its ``quant_method``, ``aliases`` what ``--quantization`` may also call it (the peers' kernel
    names; once opened, those that fit the checkpoint), ``reference`` who defined it. Opening raises E0212
    where the config is impossible.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]]
    reference: ClassVar[str]
    unused: ClassVar[tuple[str, ...]]  # regular expressions of tensors it writes that nobody needs

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None: ...

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """The evidence that this checkpoint is of this format, or None."""

    def scheme_of(self, module: StoredModule) -> Scheme:
        """The scheme the module is stored in, from headers and config alone."""

    def tensors_of(self, module: StoredModule) -> list[str]:
        """The names of every stored tensor ``read`` will use, bias included."""

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """The module's weight in canonical form."""

    def describe(self) -> str:
        """A few words for people: ``gptq, 4-bit, group 128 in config.json``."""


@cache
def all_formats() -> tuple[type[CheckpointFormat], ...]:
    """Every format of this package, sorted by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    found: list[type[CheckpointFormat]] = []
    for module in modules:
        formats = getattr(module, "FORMATS", None) or (getattr(module, "FORMAT", None),)
        found += [fmt for fmt in formats if isinstance(fmt, type)]
    return tuple(found)


def detect(header: CheckpointHeader) -> type[CheckpointFormat]:
    """The one format that claims the checkpoint; none or several is an error listing the evidence."""
    claims = [(fmt, evidence) for fmt in all_formats() if (evidence := fmt.claims(header))]
    if len(claims) == 1:
        return claims[0][0]
    if not claims:
        from lowbit.formats.refused import refuse

        refuse(header)
    listed = "; ".join(f"{fmt.name} ({evidence})" for fmt, evidence in claims)
    raise LowbitError(
        "E0211",
        f"{header.root.name}: several checkpoint formats claim this model: {listed}. "
        "Correct quantization_config in config.json",
    )


def entry_of(
    header: CheckpointHeader, module: StoredModule, suffix: str, dtypes: tuple[str, ...], what: str
) -> TensorEntry:
    """A tensor the module must have, of one of ``dtypes``; ``what`` says why, for the message."""
    name = module.tensor(suffix)
    entry = header.tensors.get(name)
    if entry is None:
        raise LowbitError("E0209", f"{header.root.name}: no file contains {name!r} ({what})")
    if entry.dtype not in dtypes:
        raise LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; {what} stores "
            f"{' or '.join(dtypes)}. The packing does not match the quantization config",
        )
    return entry


def check_shape(entry: TensorEntry, expected: tuple[int, ...], what: str) -> None:
    """E0213 unless the tensor has the expected shape."""
    if entry.shape != expected:
        raise LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {what} stores "
            f"{list(expected)}. The packing does not match the quantization config",
        )


def require_tensors(header: CheckpointHeader, suffixes: tuple[str, ...], place: str, method: str) -> None:
    """E0213 where a config says quantized and no tensor is: the model was dequantized, the config kept."""
    if not any(name.endswith(suffixes) for name in header.tensors):
        example = next((name for name in header.tensors if name.endswith(".weight")), "")
        raise LowbitError(
            "E0213",
            f"{header.root.name}: {place} says {method} but no tensor ends in {' or '.join(suffixes)} "
            f"(e.g. {example!r} is {header.tensors[example].dtype if example else 'absent'}); if the model "
            "was dequantized, remove the quantization config (lowbit check MODEL --fix OUT)",
        )


def finite_scales(header: CheckpointHeader, name: str, scales: Tensor) -> Tensor:
    """The scales themselves, or E0215 with how many are NaN or infinite and where the first is."""
    wide = scales.float()
    bad = ~wide.isfinite()
    if bad.any():
        first = bad.nonzero()[0].tolist()
        kind = "NaN" if wide.isnan().any() else "infinite"
        raise LowbitError(
            "E0215",
            f"{header.file_of(name)}: tensor {name!r} contains {int(bad.sum()):,} {kind} of "
            f"{scales.numel():,} (first at {first}); the file is damaged, download it again "
            "(lowbit check shows all)",
        )
    return scales
