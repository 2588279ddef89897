"""One pass over every byte of a checkpoint, in slices: numbers that no sound checkpoint holds.

Files are read, not mapped, into one buffer of ``SLICE`` bytes: memory stays small however large the model is,
and a file that is cut while it is read ends in a finding. A slice goes to all checks of its tensor:

    floats (F32, F16, BF16)    NaN and infinity by the smallest and largest number, which NaN poisons
    bytes (F8_*, I8, U8, …)    a histogram of the 256 codes; which of them are NaN the number format says
    GGUF blocks                the floats inside each block, at the places of ``BLOCK_FLOATS``

The GPTQ rules (``packing``) put checks of their own beside these, so that nothing is read twice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import DTYPES
from lowbit.doctor.rules import Report
from lowbit.errors import printable, thousands
from lowbit.numerics.number_formats import number_format

SLICE = 4 << 20
Progress = Callable[[int, int, str], None]

# Tensors that are scales by their names, in any format.
_SCALE = re.compile(r"(scales?|scales?_inv|scale_2|scale_packed|qscale_weight|qscale_act|absmax|\.SCB|\.s)$")
_AGAIN = "the file is damaged, download it again"

# Where a GGUF block keeps its f16 numbers (a test compares this with ``block_layouts``). MXFP4 has an
# exponent byte, IQ1_M spreads its number over four nibbles; NVFP4's scales cannot be NaN.
BLOCK_FLOATS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


class Check(Protocol):
    """Sees a tensor's bytes once, slice by slice. ``unit``: slices hold a multiple of so many bytes."""

    unit: int

    def add(self, raw: Tensor) -> None:
        """uint8 (bytes,), valid only during the call."""

    def finish(self, report: Report) -> None:
        """Say what was found."""


def scan(
    header: CheckpointHeader,
    more: dict[str, list[Check]],
    limits: dict[str, tuple[int, int]],
    report: Report,
    on_progress: Progress | None = None,
) -> None:
    """Read all tensors in the order they lie in; ``more``: further checks by tensor."""
    buffer = bytearray(SLICE)
    done, total = 0, header.nbytes
    # bitsandbytes may store packed bytes as numbers of the model's dtype.
    opaque = {name.removesuffix(".quant_map") for name in header.tensors if name.endswith(".quant_map")}
    for name, entry in sorted(header.tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        usual = [_Zeros(entry)] if name in opaque else _checks(entry, limits.get(name))
        if _beside_plain(header, name):
            usual = []
        checks: list[Check] = [*usual, *more.get(name, ())]
        start = done
        for raw in _slices(entry, max((check.unit for check in checks), default=1), buffer, report):
            for check in checks:
                check.add(raw)
            done += raw.numel()
            if on_progress is not None:
                on_progress(done, total, "checking")
        if done - start == entry.nbytes:
            for check in checks:
                check.finish(report)


def _beside_plain(header: CheckpointHeader, name: str) -> bool:
    """Whether it is a scale beside a plain matrix: nobody reads it, and transformers fills it with "
    "anything."""
    stem, _, suffix = name.rpartition(".")
    weight = header.tensors.get(f"{stem}.weight")
    plain = weight is not None and weight.dtype in ("F32", "F16", "BF16")
    return plain and suffix in ("weight_scale_inv", "weight_scale")


def _slices(entry: TensorEntry, unit: int, buffer: bytearray, report: Report) -> Iterator[Tensor]:
    """uint8 views of ``buffer`` (of a larger one where a unit needs it), each filled with the next bytes."""
    if unit > len(buffer):
        buffer = bytearray(unit)
    size = len(buffer) // unit * unit
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                wanted = memoryview(buffer)[: min(size, left)]
                got = 0
                while got < len(wanted) and (count := os.readv(file.fileno(), [wanted[got:]])):
                    got += count
                if got < len(wanted):
                    raise OSError(
                        None, f"ends {left - got} bytes too early; it was changed while it was read"
                    )
                yield torch.frombuffer(buffer, dtype=torch.uint8, count=got)
                left -= got
    except OSError as error:
        report.whole = False
        file_name = entry.file.name
        report.add("D001", f"{file_name}: {error.strerror or error}", file=file_name, tensor=entry.name)


def _checks(entry: TensorEntry, limits: tuple[int, int] | None) -> list[Check]:
    """What any tensor of this kind is checked for."""
    kind = GGUF_TYPES_BY_NAME.get(entry.dtype)
    if kind is not None and kind.weights > 1:
        return [_Blocks(entry)]
    scale = _SCALE.search(entry.name) is not None
    if entry.dtype in ("F64", "F32", "F16", "BF16"):
        return [_Floats(entry, scale)]
    if entry.dtype.startswith("F8") or (scale and entry.dtype == "U8" and not entry.name.endswith("absmax")):
        return [_Bytes(entry, scale)]
    if limits is not None:
        return [_Codes(entry, limits)]
    return [_Zeros(entry)] if len(entry.shape) > 1 and entry.dtype in ("I32", "I8", "U8") else []


class _Base:
    """A tensor's place, and how a finding begins."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        kind = DTYPES.get(entry.dtype)
        self.unit = 1 if kind is None else kind.itemsize
        self.seen = 0  # units
        self.zeros = True

    def say(self, report: Report, rule: str, what: str) -> None:
        entry, file = self.entry, self.entry.file.name
        shown = f"tensor {printable(entry.name)!r} ({entry.dtype} {list(entry.shape)})"
        report.add(rule, f"{file}: {shown} {what}", file=file, tensor=entry.name)

    def place(self, flat: int) -> list[int]:
        """The indices of element number ``flat``."""
        return [int(n) for n in np.unravel_index(flat, self.entry.shape)] if self.entry.shape else []

    def say_zeros(self, report: Report) -> None:
        if self.zeros and len(self.entry.shape) > 1 and self.entry.nbytes:
            self.say(report, "D208", "is all zero; compare the file with its source (its hash, if published)")


class _Zeros(_Base):
    """Whole numbers: only whether there is anything but zero."""

    def add(self, raw: Tensor) -> None:
        self.zeros = self.zeros and not raw.any()

    def finish(self, report: Report) -> None:
        if not self.entry.name.endswith(("zeros", "zero_point")):  # zero points may well be
            self.say_zeros(report)


class _Floats(_Base):
    """Numbers of two bytes and more."""

    def __init__(self, entry: TensorEntry, scale: bool) -> None:
        super().__init__(entry)
        self.scale = scale
        self.nans = self.infinite = self.zero_count = 0
        self.first = -1

    def add(self, raw: Tensor) -> None:
        values = raw.view(DTYPES[self.entry.dtype])
        low, high = torch.aminmax(values)
        if not (low.isfinite() and high.isfinite()):
            bad = ~values.isfinite()
            nans = int(values.isnan().sum())
            self.nans += nans
            self.infinite += int(bad.sum()) - nans
            if self.first < 0:
                self.first = self.seen + int(bad.nonzero()[0])
        self.zeros = self.zeros and bool(low == 0) and bool(high == 0)
        if self.scale:
            self.zero_count += int((values == 0).sum())
        self.seen += values.numel()

    def finish(self, report: Report) -> None:
        if self.first >= 0:
            self.say(
                report,
                "D202" if self.scale else "D201",
                f"holds {_numbers(self.nans, self.infinite)} of {thousands(self.seen)} numbers (first at "
                f"{self.place(self.first)}); {_AGAIN}",
            )
        if self.scale and self.zero_count:
            self.say(report, "D206", _zero_scales(self.zero_count, self.seen))
        elif not self.scale:
            self.say_zeros(report)


class _Bytes(_Base):
    """8-bit floats, and scales that are exponents in U8: the histogram of their codes."""

    def __init__(self, entry: TensorEntry, scale: bool) -> None:
        super().__init__(entry)
        self.scale = scale
        self.counts = torch.zeros(256, dtype=torch.int64)
        kind = torch.float8_e8m0fnu if entry.dtype == "U8" else DTYPES[entry.dtype]
        worth = torch.arange(256, dtype=torch.uint8).view(kind).float()
        self.nan, self.infinity, self.zero = worth.isnan(), worth.isinf(), worth == 0
        self.exponent = kind is torch.float8_e8m0fnu
        self.first = -1

    def add(self, raw: Tensor) -> None:
        counts = torch.bincount(raw, minlength=256)
        bad = self.nan | self.infinity
        if self.first < 0 and bool(counts[bad].any()):
            self.first = self.seen + int(bad[raw.int()].nonzero()[0])
        self.counts += counts
        self.seen += raw.numel()

    def finish(self, report: Report) -> None:
        nans, infinite = int(self.counts[self.nan].sum()), int(self.counts[self.infinity].sum())
        zeros = int(self.counts[self.zero].sum())
        if nans or infinite:
            self.say(
                report,
                "D204" if self.exponent else "D202" if self.scale else "D203",
                f"holds {_numbers(nans, infinite)} of {thousands(self.seen)} numbers (first at "
                f"{self.place(self.first)}); {_AGAIN}",
            )
        if self.scale and zeros:
            self.say(report, "D206", _zero_scales(zeros, self.seen))
        self.zeros = zeros == self.seen and not self.scale
        self.say_zeros(report)


class _Codes(_Base):
    """Codes or zero points of fewer than 8 bits that are stored one an I8."""

    def __init__(self, entry: TensorEntry, limits: tuple[int, int]) -> None:
        super().__init__(entry)
        self.limits = limits
        self.low, self.high = 127, -128

    def add(self, raw: Tensor) -> None:
        low, high = torch.aminmax(raw.view(torch.int8))
        self.low, self.high = min(self.low, int(low)), max(self.high, int(high))

    def finish(self, report: Report) -> None:
        low, high = self.limits
        if self.entry.nbytes and (self.low < low or self.high > high):
            self.say(
                report,
                "D207",
                f"holds codes from {self.low} to {self.high}, its number of bits has {low} to {high}; "
                "correct num_bits in the quantization config, or export the model again",
            )


class _Blocks(_Base):
    """The floats inside GGUF blocks."""

    def __init__(self, entry: TensorEntry) -> None:
        super().__init__(entry)
        kind = GGUF_TYPES_BY_NAME[entry.dtype]
        self.unit, self.weights = kind.bytes, kind.weights
        self.bad = self.zero_blocks = 0
        self.first = -1

    def add(self, raw: Tensor) -> None:
        scales = self._scales(raw.view(-1, self.unit))
        # The sum of finite numbers times zero is zero; NaN and infinity stay.
        if not bool((scales * 0).sum().isfinite()):
            bad = ~scales.isfinite().all(1)
            self.bad += int(bad.sum())
            if self.first < 0:
                self.first = self.seen + int(bad.nonzero()[0])
        self.zero_blocks += int((scales == 0).all(1).sum())
        self.seen += scales.shape[0]

    def _scales(self, blocks: Tensor) -> Tensor:
        """float32 (blocks, numbers)."""
        kind = self.entry.dtype
        if kind in BLOCK_FLOATS:
            pairs = [blocks[:, at : at + 2] for at in BLOCK_FLOATS[kind]]
            return torch.cat(pairs, 1).view(torch.float16).float()
        if kind == "MXFP4":
            return number_format("e8m0").table()[blocks[:, :1].int()]
        if kind == "NVFP4":
            return (blocks[:, :4] & 127).float()
        layout = number_format(f"gguf_{kind.lower()}").block
        assert layout is not None, "every GGUF block type has a layout"
        parts = [layout.expand(some).scales[-1] for some in blocks.split(1 << 12)]
        return torch.cat(parts)

    def finish(self, report: Report) -> None:
        if self.bad:
            row = self.place(self.first * self.weights)
            self.say(
                report,
                "D205",
                f"has NaN or infinite scales in {thousands(self.bad)} of {thousands(self.seen)} blocks "
                f"(first with weight {row}); {_AGAIN}",
            )
        if self.zero_blocks:
            self.say(report, "D206", _zero_scales(self.zero_blocks, self.seen))


class Digest:
    """The hash of a tensor's bytes, to compare two of them."""

    unit = 1

    def __init__(self) -> None:
        self._hash = hashlib.blake2b()

    def add(self, raw: Tensor) -> None:
        """Take a slice."""
        self._hash.update(raw.numpy().data)

    def finish(self, report: Report) -> None:
        """Nothing to say by itself."""

    @property
    def value(self) -> bytes:
        """The hash of all slices."""
        return self._hash.digest()


def _numbers(nans: int, infinite: int) -> str:
    """ "3 NaN and 1 infinite"."""
    parts = [f"{thousands(nans)} NaN"] if nans else []
    parts += [f"{thousands(infinite)} infinite"] if infinite else []
    return " and ".join(parts)


def _zero_scales(count: int, total: int) -> str:
    return f"has {thousands(count)} of {thousands(total)} scales that are zero; so are their weights"
