"""How a quantized weight lies in GPU memory: planes of codes, scales as they were in the file. Plain torch.

Columns are cut in tiles of ``Layout.tile`` (16, 32 or 64), so that one tile lies in one group of every scale
level. Codes below 8 bits are split in planes of 4, 2 and 1 bits (7 = 4 + 2 + 1, low bits first). A plane of
``width`` bits keeps ``8 // width`` neighbouring tiles, a *run*, in the bytes of one: byte j of the run holds
column j of the first tile in its low bits, column j of the second in the next ones, and so on. A tile is
thus a contiguous run of bytes under one shift, and the x that meets it is contiguous too. Rows end with a
whole run, filled up with zero bits.

Buffers: "plane4", "plane2", "plane1": uint8 (out, bytes of a row); or "codes", 8 bits each, (out, in): int8 =
canonical code - 128 for whole numbers, else the float8 type. "table": float32 (2^bits,), where values are no
whole numbers in sequence. "scale0", "scale1", "offset0", "offset1", "zeros": (row blocks, column blocks) of
their level. "column_order": int64 (in,).

A stack of matrices (experts) is one tall matrix, whose levels count rows in blocks that do not cross a
border. GGUF blocks are taken apart: inner scales of K-quants become int8 beside float16 outer ones, and the
values of a lattice grid (IQ types) become indices of 3 or 4 bits into a table of those that occur: more
bytes than the file has, where it stores a few bits for a vector of 4 or 8 numbers (IQ2_XXS: 3.3 bits a
weight for 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce

import torch
from torch import Tensor

from lowbit.numerics.block_tables import GRIDS
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

TILES = (64, 32, 16)
_RUN = 128  # columns of the widest plane's run, at most: what a program holds of x at once
_MOST_PADDING = 1.125  # bytes of a row to those of its codes, beyond which smaller tiles are tried
WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_FLOATS = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}
_SMALL_FLOATS = ("e2m1", "e2m3", "e3m2")  # of 4 and 6 bits, as arithmetic makes them
# How scales are read: as the numbers they are, or as bytes to decode.
_SCALE_KINDS = dict.fromkeys(("f32", "f16", "bf16", "int8"), "plain")
_SCALE_KINDS |= {name: name for name in ("e8m0", "e4m3")}
_LARGEST_EXACT = 256  # whole numbers up to it are exact in bfloat16


@dataclass(frozen=True)
class Level:
    """One level of scales: the (rows, columns) of a block, 0 meaning the whole axis, and how it is stored."""

    rows: int
    columns: int
    stored: NumberFormat

    @property
    def kind(self) -> str:
        """For the kernels: "plain", "e8m0" or "e4m3"."""
        return _SCALE_KINDS[self.stored.name]

    def blocks(self, shape: tuple[int, int], flat: bool) -> tuple[int, ...]:
        """The shape of its scales."""
        out, columns = shape
        if flat:
            return (-(-out * columns // self.columns),)
        return -(-out // (self.rows or out)), -(-columns // (self.columns or columns))


@dataclass(frozen=True)
class Layout:
    """What the kernels must know of a packed weight; ``constants`` is the same for them.

    ``kind``: "whole" where a code of c is worth c - ``base``, "table", or the name of a float.
    ``zero``: "none"; "exact" where code - zero is exact in bfloat16; or "float" where it may not be, and
    belongs into the offset of a float32 sum. ``unit``: what int8 inner scales count (a power of two, in the
    table).
    """

    shape: tuple[int, int]
    bits: int
    tile: int
    kind: str
    base: int
    zero: str
    levels: tuple[Level, ...]
    offset: bool
    flat: bool
    unit: float = 1.0

    @property
    def fields(self) -> int:
        """Tiles in a run of the widest plane: what is decoded from the bytes of one load."""
        return 8 // WIDTHS[self.bits][0]

    @property
    def runs(self) -> int:
        """Runs of a row, the last one perhaps not whole."""
        return -(-self.shape[1] // (self.tile * self.fields))

    @property
    def in_words(self) -> bool:
        """Whether a product of one token reads words of four bytes: not of e5m2, e2m3 and the like."""
        return self.kind in ("whole", "table", "e2m1", "e4m3") and (self.bits < 8 or self.shape[1] % 4 == 0)

    @property
    def group(self) -> int:
        """Columns that have one scale of each level, at least; 0: all of a row."""
        if self.flat:
            return self.tile
        return math.gcd(*(level.columns for level in self.levels))

    @property
    def constants(self) -> dict[str, int | bool | str]:
        """The constants of every kernel that decodes a weight."""
        inner = self.levels[0]
        outer = self.levels[1] if len(self.levels) > 1 else Level(0, 0, number_format("f32"))
        return {
            "BITS": self.bits,
            "TILE": self.tile,
            "FIELDS": self.fields,
            "KIND": self.kind,
            "BASE": self.base,
            "ZERO": self.zero,
            "OFFSET": self.offset,
            "FLAT": self.flat,
            "LEVELS": len(self.levels),
            "ROWS0": inner.rows,
            "COLUMNS0": inner.columns,
            "SCALE0": inner.kind,
            "ROWS1": outer.rows,
            "COLUMNS1": outer.columns,
            "SCALE1": outer.kind,
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The buffers' shapes; the order of columns is not among them."""
        out, columns = self.shape
        if self.bits == 8:
            found: dict[str, tuple[int, ...]] = {"codes": self.shape}
        else:
            found = {f"plane{w}": (out, row_bytes(columns, self.tile, w)) for w in WIDTHS[self.bits]}
        if self.kind == "table":
            found["table"] = (1 << self.bits,)
        for i, level in enumerate(self.levels):
            found[f"scale{i}"] = level.blocks(self.shape, self.flat)
            if self.offset:
                found[f"offset{i}"] = found[f"scale{i}"]
        if self.zero != "none":
            found["zeros"] = found["scale0"]
        return found


POINTERS = (
    *("plane4", "plane2", "plane1", "codes", "table", "zeros"),
    *("scale0", "scale1", "offset0", "offset1"),
)


def arguments(buffers: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """The pointers of a kernel that decodes a weight, in its order; what it decodes itself as bytes."""
    return tuple(_seen(buffers.get(name), name) for name in POINTERS)


def _seen(buffer: Tensor | None, name: str) -> Tensor | None:
    if buffer is None or buffer.dtype.itemsize > 1:
        return buffer
    plain = buffer.dtype is torch.int8 and name != "codes"  # inner scales of K-quants are numbers
    return buffer if plain else buffer.view(torch.uint8)


def row_bytes(columns: int, tile: int, width: int) -> int:
    """Bytes of a row in a plane of ``width`` bits: whole runs."""
    return -(-columns // (tile * (8 // width))) * tile


# ---- Which layout a scheme gets ----


@dataclass(frozen=True)
class _Source:
    """A scheme as it is packed: GGUF blocks taken apart. ``values``: a grid's canonical codes in use."""

    scheme: Scheme
    unit: float = 1.0
    values: tuple[int, ...] = ()


# GGUF types whose scales are something else than one f16 a block: what holds them, inner first, and the unit.
_K = ("int8", "f16")
_GGUF_SCALES: dict[str, tuple[tuple[str, ...], float]] = {
    **{f"gguf_{name}": (_K, 1.0) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq3_s")},
    **{f"gguf_{name}": (_K, 0.125) for name in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")},
    "gguf_iq3_xxs": (_K, 0.25),
    "gguf_mxfp4": (("e8m0",), 1.0),
    "gguf_nvfp4": (("e4m3",), 1.0),
}
_GGUF_GRIDS = {
    f"gguf_{name}": name.upper() for name in ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
}
_GGUF_GRIDS["gguf_iq1_m"] = "IQ1_S"


@cache
def _source(scheme: Scheme) -> _Source:
    layout, name = scheme.weight.block, scheme.weight.name
    if layout is None:
        return _Source(scheme)
    parts = layout.expand(torch.zeros(1, layout.bytes, dtype=torch.uint8))
    stored, unit = _GGUF_SCALES.get(name, (("f16",), 1.0))
    codes, values = number_format(parts.number_format), _grid_values(name)
    if values:
        bits = (len(values) - 1).bit_length()
        known = tuple(float(value - 128) for value in values)
        codes = NumberFormat(f"{name} values", bits, known + (0.0,) * ((1 << bits) - len(values)))
    expanded = Scheme(
        codes,
        tuple((1, columns) for columns in parts.columns),
        tuple(number_format(scale) for scale in stored),
        offset=bool(parts.offsets),
    )
    return _Source(expanded, unit, values)


def _grid_values(name: str) -> tuple[int, ...]:
    """The int8 codes that a lattice grid's numbers have, ascending; nothing for other types."""
    if name not in _GGUF_GRIDS:
        return ()
    numbers = GRIDS[_GGUF_GRIDS[name]][3]
    if name.startswith("gguf_iq1"):  # a shift of an eighth up or down
        return tuple(sorted({8 * number + shift + 128 for number in numbers for shift in (1, -1)}))
    return tuple(sorted({sign * number + 128 for number in numbers for sign in (1, -1)}))


@cache
def _base(fmt: NumberFormat) -> int | None:
    """What a code stands above its value, where values are whole numbers in sequence."""
    values = fmt.values or ()
    first = values[0] if values else math.nan
    whole = math.isfinite(first) and first == int(first) and first <= 0
    return -int(first) if whole and values == tuple(first + code for code in range(len(values))) else None


def layout_of(scheme: Scheme, shape: tuple[int, ...]) -> Layout | str:
    """The layout of a weight, or why there is none. What the scheme does to inputs plays no part."""
    if len(shape) != 2:
        return "stacked experts"
    if scheme.is_dense:
        return "weights are not quantized"
    if scheme.scattered:
        return "the rows of a block lie apart"
    if scheme.outliers is not None:
        return "some weights have outliers"
    source = _source(replace(scheme, activation=None, reordered=False))
    scheme, (out, columns) = source.scheme, shape
    fmt = scheme.weight
    if fmt.values is None or fmt.bits > 8:
        return f"{fmt.name} codes have no packed form"
    base, bits = _base(fmt), int(fmt.bits)
    kind = "whole" if base is not None else "table"
    if fmt.name in _FLOATS or (fmt.name in _SMALL_FLOATS and source.unit == 1):
        kind = fmt.name
    if kind == "table" and bits == 8:
        return f"{fmt.name} codes have no packed form"
    if not 1 <= len(scheme.scales) <= 2:
        return f"{len(scheme.scales)} levels of scales"
    for scale in scheme.scales:
        if scale.name not in _SCALE_KINDS:
            return f"scales are {scale.name}"
    if scheme.zero == "float" and scheme.scales[0].name not in ("f32", "f16", "bf16"):
        return f"float zero points with {scheme.scales[0].name} scales"
    widths = [group for _, group in scheme.blocks if group and group < columns]
    if scheme.flattened:
        widths = [columns, *(group for _, group in scheme.blocks)]
    for group in widths:
        if group % TILES[-1]:
            what = "rows and blocks" if scheme.flattened else "groups"
            return f"needs {what} of a multiple of {TILES[-1]} columns, got {group}"
    levels = tuple(
        Level(rows, group if group < columns or scheme.flattened else 0, scale)
        for (rows, group), scale in zip(scheme.blocks, scheme.scales, strict=True)
    )
    zero = "none" if scheme.zero == "none" else "float"
    if scheme.zero == "integer" and base is not None and (1 << bits) + base <= _LARGEST_EXACT:
        zero = "exact"
    return Layout(
        (out, columns),
        bits,
        _tile(widths, columns, bits),
        kind,
        base or 0,
        zero,
        levels,
        scheme.offset,
        scheme.flattened,
        source.unit,
    )


def _tile(widths: list[int], columns: int, bits: int) -> int:
    """The widest tile that divides every group and fills up rows by little."""
    # Bytes of two or three planes wait in registers: wider tiles would spill on Ampere.
    widest = min(_RUN // (8 // WIDTHS[bits][0]), 64 if len(WIDTHS[bits]) == 1 else 32)
    fitting = [tile for tile in TILES if tile <= widest and all(group % tile == 0 for group in widths)]
    if bits == 8:
        return fitting[0]
    for tile in fitting:
        held = sum(row_bytes(columns, tile, width) for width in WIDTHS[bits])
        if held * 8 <= _MOST_PADDING * columns * bits:
            return tile
    return fitting[-1]


def nbytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of a packed weight, its table and column order not counted."""
    layout = layout_of(scheme, shape)
    assert isinstance(layout, Layout), "refuses() was asked first"
    sizes = {name: math.prod(size) for name, size in layout.shapes.items()}
    total = sum(size for name, size in sizes.items() if name.startswith(("plane", "codes")))
    for i, level in enumerate(layout.levels):
        total += int(level.stored.bits) // 8 * (sizes[f"scale{i}"] + sizes.get(f"offset{i}", 0))
    if layout.zero != "none":
        total += sizes["zeros"] * (1 if scheme.zero == "integer" else int(layout.levels[0].stored.bits) // 8)
    return total


# ---- Packing ----


def pack(weight: QuantizedTensor, device: torch.device) -> dict[str, Tensor]:
    """The buffers of a canonical weight."""
    layout = layout_of(weight.scheme, weight.shape)
    assert isinstance(layout, Layout), "refuses() was asked first"
    source = _source(replace(weight.scheme, activation=None, reordered=False))
    # The codes go to the device first: what packing reads and writes most is then its own memory.
    there = replace(weight, codes=weight.codes.to(device)).expand()
    codes = there.codes
    if source.values:
        index = torch.zeros(256, dtype=torch.uint8, device=device)
        index[list(source.values)] = torch.arange(len(source.values), dtype=torch.uint8, device=device)
        codes = index[codes.long()]
    buffers = _packed_codes(codes, layout)
    if layout.kind == "table":
        buffers["table"] = source.scheme.weight.table(device) * layout.unit
    for i, level in enumerate(layout.levels):
        kept = level if weight.scheme.weight.block is not None else None
        unit = layout.unit if i == 0 else 1.0
        buffers[f"scale{i}"] = _stored(there.scales[i], kept, unit)
        if layout.offset:
            buffers[f"offset{i}"] = _stored(there.offsets[i], kept, unit)
    if there.zeros is not None:
        buffers["zeros"] = there.zeros
    if weight.column_order is not None:
        buffers["column_order"] = weight.column_order
    # Detached from the mapped file: its pages must not be needed once loading is over.
    mapped = {*buffers} - {"plane4", "plane2", "plane1", "table"}
    return {name: buffer.to(device, copy=name in mapped).contiguous() for name, buffer in buffers.items()}


def _stored(numbers: Tensor, level: Level | None, unit: float) -> Tensor:
    """Scales as they are kept: float32 ones of a block format, for which ``level`` is given, in its type."""
    if level is None:
        return numbers
    dtype = torch.int8 if level.stored.name == "int8" else level.stored.dtype
    assert dtype is not None, "every other scale is a float"
    return (numbers / unit).to(dtype)


def _packed_codes(codes: Tensor, layout: Layout) -> dict[str, Tensor]:
    if layout.bits == 8:
        if layout.kind == "whole":
            return {"codes": (codes ^ 128).view(torch.int8)}
        return {"codes": codes.contiguous().view(_FLOATS[layout.kind])}
    columns, shift, planes = layout.shape[1], 0, {}
    for width in WIDTHS[layout.bits]:
        run = layout.tile * (8 // width)
        plane = codes >> shift & (1 << width) - 1
        plane = torch.nn.functional.pad(plane, (0, -columns % run)).unflatten(
            -1, (-1, 8 // width, layout.tile)
        )
        held = plane[..., 0, :].clone()
        for field in range(1, 8 // width):
            held |= plane[..., field, :] << field * width
        planes[f"plane{width}"] = held.flatten(-2)
        shift += width
    return planes


def unpacked_codes(layout: Layout, buffers: Mapping[str, Tensor]) -> Tensor:
    """uint8 (out, in): the codes that ``_packed_codes`` was given."""
    if layout.bits == 8:
        codes = buffers["codes"].view(torch.uint8)
        return codes ^ 128 if layout.kind == "whole" else codes.clone()
    columns, shift = layout.shape[1], 0
    parts = []
    for width in WIDTHS[layout.bits]:
        plane = buffers[f"plane{width}"].unflatten(-1, (-1, 1, layout.tile))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device).unsqueeze(-1)
        parts.append((plane >> shifts & (1 << width) - 1).flatten(-3)[..., :columns] << shift)
        shift += width
    return reduce(torch.bitwise_or, parts)


def unpack(
    layout: Layout, scheme: Scheme, shape: tuple[int, ...], buffers: Mapping[str, Tensor], origin: str
) -> QuantizedTensor:
    """The inverse of ``pack``; block formats stay taken apart."""
    source = _source(replace(scheme, activation=None, reordered=False))
    codes = unpacked_codes(layout, buffers)
    levels = range(len(layout.levels))
    scales = [buffers[f"scale{i}"] for i in levels]
    offsets = [buffers[f"offset{i}"] for i in levels if layout.offset]
    if scheme.weight.block is not None:
        parts = scheme.weight.block.expand(torch.zeros(1, scheme.weight.block.bytes, dtype=torch.uint8))
        if source.values:
            codes = torch.tensor(source.values, dtype=torch.uint8, device=codes.device)[codes.long()]
        scales, offsets = [s.float() for s in scales], [o.float() for o in offsets]
        for inner in (scales, offsets):
            inner[:1] = [numbers * layout.unit for numbers in inner[:1]]
        f32 = number_format("f32")
        expanded = replace(source.scheme, weight=number_format(parts.number_format))
        scheme = replace(expanded, scales=(f32,) * len(scales), activation=scheme.activation)
    return QuantizedTensor(
        scheme,
        shape,
        codes,
        tuple(scales),
        buffers.get("zeros"),
        tuple(offsets),
        buffers.get("column_order"),
        origin,
    )


def fault(layout: Layout, buffers: Mapping[str, Tensor]) -> str:
    """Why buffers cannot be those of such a weight; "" where they can."""
    for name, shape in layout.shapes.items():
        if name not in buffers:
            return f"buffer {name} is missing"
        if math.prod(buffers[name].shape) != math.prod(shape):
            return f"{name} has {buffers[name].numel()} numbers instead of {math.prod(shape)}"
    order, columns = buffers.get("column_order"), layout.shape[1]
    if order is not None:
        inside = order.dtype is torch.int64 and order.shape == (columns,)
        if not inside or bool(((order < 0) | (order >= columns)).any()):
            return f"no order of {columns} columns"
    return ""
