"""cpu_blocks: weights of 1- to 8-bit codes, a scale for each 8, 16, 32 … columns, on AVX2, AVX-512 and NEON.

Takes any canonical scheme whose code values are exact in bfloat16 (integers, small floats, iq4_nl), but for
a factor that all share (bitsandbytes' fp4: 1/192) and scales take over, and all GGUF blocks: K-quants and
IQ types keep their two levels of scales, IQ1 to IQ3 their indices into a grid of vectors. An outer scale
for a whole row or tensor (NVFP4) multiplies the result. The input is rounded to bfloat16; codes are exact,
accumulation and scales are float32: weights are never rounded. The exception are other 4-bit tables (nf4):
their values become whole numbers up to 4095 and meet x as whole numbers up to 16383, a scale for each 32
columns; both together are off by less than an eighth of what bfloat16 costs the inputs of the other
formats. On processors that do not multiply bfloat16 (AVX2, older ARM) all whole-number codes meet x as whole
numbers likewise, up to 32767. Rows that are looked up are exact for all. Zero points that are no whole
numbers (HQQ) are subtracted from the codes as float16: all that a float16 or bfloat16 holds, but for
bfloat16s below 2^-14 of a code, which move by less than 2^-25 of one. Beside float32 scales they are offsets,
-zero * scale, a last bit of float32 away.

What the tiles have no place for is packed in other words for the same numbers, where these take little
more: blocks that run over row ends as smaller ones, groups that are no whole tiles as parts of them, codes
of 1, 5 or 6 bits in groups of 8 as those of 2 or 8.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import (
    ADDEND_NONE,
    ADDEND_OFFSET,
    ADDEND_ZERO,
    CODES,
    COLUMNS,
    GRIDS,
    INPUT_BFLOAT,
    LARGEST_VALUE,
    SCALE_DTYPES,
    SCALES_BF16,
    SCALES_E4M3,
    SCALES_F16,
    SCALES_F32,
    SCALES_NIBBLES,
    SCALES_ODD_NIBBLES,
    SCALES_TWO_LEVEL,
    SUPER,
    Description,
    NativeWeight,
    Parts,
)
from lowbit.numerics.block_layouts import grid_vectors
from lowbit.numerics.block_tables import GRIDS as GRID_TABLES
from lowbit.numerics.cutting import in_rows, scheme_in_rows
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_SCALE_KINDS = {
    "f16": SCALES_F16,
    "bf16": SCALES_BF16,
    "f32": SCALES_F32,
    "e8m0": SCALES_BF16,  # powers of two are exact in bf16
    "e4m3": SCALES_E4M3,
}
_LARGEST_GROWTH = 1.45  # packed bytes to the scheme's own; what is refused runs many times slower
# GGUF types whose inner scales are small whole numbers and whose outer ones are f16.
_TWO_LEVEL = {f"gguf_{name}" for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")}
_SMALL_FLOATS = {"gguf_mxfp4": "bf16", "gguf_nvfp4": "e4m3"}  # what holds their scales exactly
_ONE_LEVEL = {
    f"gguf_{name}" for name in ("q1_0", "tq1_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "tq2_0")
}
# Those whose inner scales have 4 bits: what the first two are worth.
_NIBBLES = {"gguf_q2_k": (0.0, 1.0), "gguf_iq3_xxs": (0.25, 0.75), "gguf_iq3_s": (1.0, 3.0)}
_NIBBLES |= {f"gguf_iq2_{name}": (0.125, 0.375) for name in ("xxs", "xs", "s")}
_NIBBLES |= {f"gguf_iq1_{name}": (0.125, 0.375) for name in ("s", "m")}
# Those whose codes are indices of vectors: how they are stored, and the grid's name.
_GRID_TYPES = {
    "gguf_iq1_s": ("grid1_2048", "IQ1_S"),
    "gguf_iq1_m": ("grid1_2048", "IQ1_S"),
    "gguf_iq2_xxs": ("grid2_256", "IQ2_XXS"),
    "gguf_iq2_xs": ("grid2_512", "IQ2_XS"),
    "gguf_iq2_s": ("grid2_1024", "IQ2_S"),
    "gguf_iq3_xxs": ("grid3_256", "IQ3_XXS"),
    "gguf_iq3_s": ("grid3_512", "IQ3_S"),
}
_SLICE = 1 << 22  # weights of a grid taken apart at once


@cache
def _expanded(scheme: Scheme) -> Scheme | None:
    """The scheme a block format takes apart to, or None where its scales have no native form."""
    name, layout = scheme.weight.name, scheme.weight.block
    if layout is None:
        return scheme
    if name not in _TWO_LEVEL | _ONE_LEVEL | _NIBBLES.keys() and name not in _SMALL_FLOATS:
        return None
    parts = layout.expand(torch.zeros(1, layout.bytes, dtype=torch.uint8))
    inner = _SMALL_FLOATS.get(name, "int8" if name in _TWO_LEVEL else "f16")
    scales = [number_format(scale) for scale in (inner, "f16")[: len(parts.columns)]]
    codes = number_format(parts.number_format)
    if name in _NIBBLES:
        first, second = _NIBBLES[name]
        values = tuple(first + (second - first) * i for i in range(16))
        scales[0] = NumberFormat(f"{name} scales", 4, values)
    if name in _GRID_TYPES:
        codes = NumberFormat(name, scheme.weight.bits, codes.values)
    return Scheme(
        codes,
        tuple((1, columns) for columns in parts.columns),
        tuple(scales),
        offset=bool(parts.offsets),
        activation=scheme.activation,
    )


@cache
def _code_kind(fmt: NumberFormat) -> str | None:
    """The name in ``CODES`` of how such codes are stored, or None."""
    if fmt.name in _GRID_TYPES:
        return _GRID_TYPES[fmt.name][0]
    if fmt.name in ("int8", "uint8", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"):
        return fmt.name
    if fmt.values is None or not 1 <= fmt.bits <= 7:
        return None
    table = fmt.table()
    if fmt.bits == 7 and not torch.equal(table, table[0] + torch.arange(128)):
        return None  # the native code adds where it has no registers for a table
    if torch.equal(table.bfloat16().float(), table) or _common_factor(fmt) is not None:
        return f"bits{int(fmt.bits)}"
    return "words4" if fmt.bits == 4 else None


@cache
def _common_factor(fmt: NumberFormat) -> float | None:
    """What divides a 4-bit table's values into whole numbers that bfloat16 holds, or None."""
    if fmt.bits != 4:
        return None
    table = fmt.table().double()
    most = float(table.abs().max())
    for largest in range(1, 2049):
        whole = (table * largest / most).round()
        divides = torch.equal((whole * most / largest).float(), fmt.table())
        if divides and torch.equal(whole.bfloat16().double(), whole):
            return most / largest
    return None


@cache
def _words(fmt: NumberFormat) -> tuple[Tensor, float]:
    """float64 (16,): whole numbers up to 4095, nearest to a table's values over a factor; and the factor."""
    table = fmt.table().double()
    most = float(table.abs().max())
    counts = torch.linspace(LARGEST_VALUE / 2, LARGEST_VALUE, 1 << 16, dtype=torch.float64)
    steps = (most / counts).float().double().unsqueeze(1)  # (tries, 1)
    whole = (table / steps).round().clamp(-LARGEST_VALUE, LARGEST_VALUE)
    best = int((whole * steps - table).abs().amax(1).argmin())
    return whole[best], float(steps[best])


@cache
def _factor(fmt: NumberFormat) -> float:
    """What the numbers in ``_table`` are multiplied with to be worth what the format says."""
    kind = _code_kind(fmt)
    if kind == "words4":
        return _words(fmt)[1]
    exact = kind != "bits4" or torch.equal(fmt.table().bfloat16().float(), fmt.table())
    return 1.0 if exact else _common_factor(fmt) or 1.0


@cache
def _table(fmt: NumberFormat) -> Tensor:
    """bfloat16 (64,): the value of every index the kernel may form, short tables repeated.

    As bytes where more follows: all 128 values of 7 bits, a grid. With a ``_factor`` 16 numbers of 16 bits
    twice, then 16 float32 values.
    """
    if fmt.name in _GRID_TYPES:
        return _grid_table(fmt.name)
    if fmt.bits == 8:
        return torch.zeros(64, dtype=torch.bfloat16)
    factor = _factor(fmt)
    if factor != 1.0:
        words = _code_kind(fmt) == "words4"
        numbers = _words(fmt)[0].short() if words else (fmt.table().double() / factor).round().bfloat16()
        return torch.cat((numbers.repeat(2).view(torch.uint8), fmt.table().view(torch.uint8)))
    values = fmt.table()[:64].bfloat16()
    if fmt.bits == 7:
        bits = fmt.table().bfloat16().view(torch.int16).int()
        return torch.cat((values.view(torch.uint8), _bytes(bits)))
    return values.repeat(64 // len(values)).contiguous()


def _bytes(words: Tensor) -> Tensor:
    """uint8 (2 n,): the low bytes of n words of 16 bits, then their high ones."""
    return torch.cat((words & 255, words >> 8 & 255)).to(torch.uint8)


def _numbers(name: str) -> Tensor:
    """float32 (2, values): what the numbers of a grid's vectors are worth, by the last bit."""
    kind, grid_name = _GRID_TYPES[name]
    values = torch.tensor(GRID_TABLES[grid_name][3], dtype=torch.float32)
    if GRIDS[CODES[kind]].shifted:
        return torch.stack((8 * values + 1, 8 * values - 1))
    return torch.stack((values, -values))


def _vectors(name: str) -> tuple[Tensor, Tensor]:
    """int64 (vectors, numbers): which of its values each number of a grid has; and the values, int16."""
    grid_name = _GRID_TYPES[name][1]
    values = torch.tensor(GRID_TABLES[grid_name][3], dtype=torch.int16)
    return torch.searchsorted(values, grid_vectors(grid_name, torch.device("cpu"))), values


@cache
def _grid_table(name: str) -> Tensor:
    """uint8: the 64 bfloat16 values of planes, then the low bytes of the vectors' words and the high ones."""
    grid = GRIDS[CODES[_GRID_TYPES[name][0]]]
    width, planes = (2, 3) if grid.numbers == 8 else (4, 5)
    first, second = _NIBBLES[name]
    table = torch.zeros(2, 1 << planes - 1)
    numbers = _numbers(name) * (second - first) / 2  # beside scales of 2 n + 1
    table[:, : numbers.shape[1]] = numbers
    # Field by field, a pair of columns and the pair two further in the same place of the word's two bytes.
    pairs = torch.arange(grid.numbers)
    places = pairs // 4 * 2 + pairs % 2 + 8 // width * (pairs // 2 % 2)
    words = (_vectors(name)[0] << places * width).sum(1)
    bfloats = table.flatten().bfloat16().repeat(64 // table.numel()).view(torch.uint8)
    return torch.cat((bfloats, _bytes(words)))


def _to_grid(codes: Tensor, name: str) -> Tensor:
    """uint8 (rows, columns) codes of ``int8`` -> what ``Parts`` wants of a grid."""
    grid = GRIDS[CODES[_GRID_TYPES[name][0]]]
    vectors, values = _vectors(name)
    shares = torch.arange(grid.numbers) * grid.share
    known = torch.zeros(1 << grid.share * grid.numbers, dtype=torch.int32)
    known[(vectors << shares).sum(1)] = torch.arange(len(vectors), dtype=torch.int32)
    signed = codes.short() - 128
    size = (signed + 4) // 8 if grid.shifted else signed.abs()
    last = (signed < 8 * size) if grid.shifted else signed < 0
    keys = torch.searchsorted(values, size, out_int32=True).unflatten(-1, (-1, grid.numbers))
    index = known[(keys << shares.int()).sum(-1)].unsqueeze(-1)
    return ((index >> shares.int() & (1 << grid.share) - 1).flatten(-2) << 1 | last).to(torch.uint8)


def _from_grid(packed: Tensor, name: str) -> Tensor:
    """The inverse of ``_to_grid``."""
    grid = GRIDS[CODES[_GRID_TYPES[name][0]]]
    shares = torch.arange(grid.numbers) * grid.share
    index = ((packed >> 1).int().unflatten(-1, (-1, grid.numbers)) << shares.int()).sum(-1)
    numbers = _vectors(name)[0][index].flatten(-2)
    return (_numbers(name)[(packed & 1).long(), numbers] + 128).to(torch.uint8)


def _taken_apart(weight: QuantizedTensor) -> QuantizedTensor:
    """A grid's weight expanded with its codes as ``Parts`` wants them, some rows at a time."""
    step = max(1, _SLICE // weight.shape[-1])
    slices = []
    for start in range(0, weight.shape[0], step):
        part = weight.rows(start, min(start + step, weight.shape[0])).expand()
        slices.append(replace(part, codes=_to_grid(part.codes, weight.scheme.weight.name)))
    if len(slices) == 1:
        return slices[0]
    return replace(
        slices[0],
        shape=weight.shape,
        codes=torch.cat([part.codes for part in slices]),
        scales=tuple(torch.cat(scales) for scales in zip(*(part.scales for part in slices), strict=True)),
    )


def _describe(scheme: Scheme, shape: tuple[int, ...]) -> Description | str:
    """The native description of an expanded scheme, or why there is none."""
    fmt, (out, columns) = scheme.weight, shape[-2:]
    code_kind = _code_kind(fmt)
    if code_kind is None:
        return f"{fmt.name} codes are not exact in bfloat16 or have no packed form"
    if scheme.zero == "float" and scheme.scales[0].name not in ("f16", "bf16"):
        return f"float zero points with {scheme.scales[0].name} scales"
    two_level = (
        len(scheme.scales) == 2 and _inner_level(scheme) is not None and scheme.blocks[1] == (1, SUPER)
    )
    if len(scheme.scales) != 1 and not two_level and not _has_row_scale(scheme):
        return f"{len(scheme.scales)} levels of scales"
    inner = scheme.scales[0].name
    if not two_level and inner not in _SCALE_KINDS:
        return f"scales are {inner}"
    group = scheme.blocks[0][1]
    least = code_kind in ("bits2", "bits3", "bits4", "int8", "uint8") and not two_level
    if group % COLUMNS and group not in (16, columns) and not (least and group == 8):
        return f"needs groups of 8, 16 or a multiple of {COLUMNS}, got {group} of {fmt.name}"
    step = COLUMNS if group in (0, 8, 16, columns) else group
    padded = -(-columns // step) * step
    group = padded if group in (0, columns) else group
    kind = _inner_level(scheme) if two_level else _SCALE_KINDS[inner]
    assert kind is not None, "two levels have an inner one"
    if code_kind == "words4" and (scheme.offset or scheme.zero != "none"):
        return f"{fmt.name} codes with zero points or offsets"
    addend = ADDEND_OFFSET if scheme.offset else ADDEND_ZERO if scheme.zero != "none" else ADDEND_NONE
    factor = _factor(fmt)
    return Description(None, None, out, padded, CODES[code_kind], group, kind, addend, INPUT_BFLOAT, factor)


def _inner_level(scheme: Scheme) -> int | None:
    """The kind of scale that stands below one f16 for 256 columns, or None."""
    inner = scheme.scales[0]
    if inner.name == "int8":
        return SCALES_TWO_LEVEL
    if inner.name.removesuffix(" scales") not in _NIBBLES or inner.values is None:
        return None
    return SCALES_ODD_NIBBLES if inner.values[0] else SCALES_NIBBLES


def _is_order(order: Tensor, columns: int) -> bool:
    inside = order.dtype is torch.int64 and order.shape == (columns,)
    return inside and bool((order >= 0).all()) and bool((order < columns).all())


def _has_row_scale(scheme: Scheme) -> bool:
    """Whether the outer level is one float32 for a row, or for all of them."""
    if len(scheme.scales) != 2 or scheme.offset:
        return False
    rows, columns = scheme.blocks[1]
    return scheme.scales[1].name == "f32" and columns == 0 and rows in (0, 1)


def _folded(scheme: Scheme) -> Scheme:
    """The scheme with offsets for float zero points beside float32 scales: both are as exact."""
    if scheme.zero != "float" or tuple(scale.name for scale in scheme.scales) != ("f32",) or scheme.offset:
        return scheme
    return replace(scheme, zero="none", offset=True)


def _fold(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight in ``_folded``, zero points within float16."""
    zeros, scale = weight.zeros, weight.scales[0] if weight.scales else None
    if weight.scheme.zero != "float" or zeros is None or scale is None:
        return weight
    scheme = _folded(weight.scheme)
    if scheme.offset:
        return replace(weight, scheme=scheme, zeros=None, offsets=(-zeros.float() * scale,))
    far = zeros.abs() > torch.finfo(torch.float16).max
    if not bool(far.any()):
        return weight
    # Bfloat16s from 2^16 on, where neighbours are 512 apart: a code of 8 bits is lost beside them, and in
    # bfloat16 arithmetic too. What is left, -zero * scale, has powers of two to move.
    near, exponent = torch.frexp(zeros.float())
    (rows, columns), (out, width) = scheme.blocks[0], weight.shape[-2:]
    spread = far.repeat_interleave(rows or out, 0)[:out].repeat_interleave(columns or width, 1)[:, :width]
    return replace(
        weight,
        codes=weight.codes.masked_fill(spread, 0),
        scales=(torch.where(far, torch.ldexp(scale.float(), exponent), scale.float()).to(scale.dtype),),
        zeros=torch.where(far, near, zeros.float()).to(zeros.dtype),
    )


def _native(scheme: Scheme, shape: tuple[int, ...]) -> Scheme | None:
    """What is packed of a scheme: block formats taken apart, zero points folded, groups that divide a row."""
    expanded = _expanded(scheme)
    if expanded is None:
        return None
    return _widened(_whole_groups(_folded(scheme_in_rows(expanded, shape[-1])), shape))


def _widened(scheme: Scheme) -> Scheme:
    """The scheme with codes of more bits for the same numbers, where its own have no form in groups of 8."""
    fmt, group = scheme.weight, scheme.blocks[0][1] if scheme.blocks else 0
    if group != 8 or not fmt.is_integer or int(fmt.bits) not in (1, 5, 6):
        return scheme
    signed = fmt.name.startswith("int")
    bits = 2 if fmt.bits == 1 and not signed else 8
    return replace(scheme, weight=number_format(f"{'int' if signed else 'uint'}{bits}"))


def _whole_groups(scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme with smaller groups where its last one is short, or its tiles are not whole.

    Columns that are no multiple of 32 are filled up with zeros: to whole groups, or to whole tiles in groups
    that divide them, whichever is less.
    """
    if scheme.flattened or not scheme.blocks:
        return scheme
    columns, (rows, group) = shape[-1], scheme.blocks[0]
    if group in (0, 8, 16, columns):
        return scheme
    if group > columns:
        part = columns
    elif columns % COLUMNS:
        tiles = -(-columns // COLUMNS) * COLUMNS
        parts = {part: -(-columns // part) * part for part in (group, math.gcd(group, tiles))}
        numbers = sum(scale.bits for scale in scheme.scales[:1]) + 16 * (scheme.zero != "none")
        part = min(parts, key=lambda part: parts[part] * (scheme.weight.bits + numbers / part))
    else:
        part = math.gcd(group, columns)
    if part % COLUMNS and part != columns and not part % 16:
        part = 16
    return scheme if part == group else replace(scheme, blocks=((rows, part), *scheme.blocks[1:]))


def _regrouped(weight: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The weight in ``_whole_groups``: each number of a group repeated for the parts it was cut into."""
    group, part = weight.scheme.blocks[0][1], scheme.blocks[0][1]
    count = -(-weight.shape[-1] // part)

    def cut(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(group // part, -1)[..., :count]

    return replace(
        weight,
        scheme=scheme,
        scales=(cut(weight.scales[0]), *weight.scales[1:]),
        zeros=None if weight.zeros is None else cut(weight.zeros),
        offsets=tuple(cut(offset) if level == 0 else offset for level, offset in enumerate(weight.offsets)),
    )


def _recoded(weight: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The weight with the codes of ``_widened``; zero points are in units of values and stay."""
    if weight.scheme.weight == scheme.weight:
        return weight
    return replace(weight, scheme=scheme, codes=weight.codes + _moved_by(weight.scheme, scheme))


def _moved_by(own: Scheme, wide: Scheme) -> int:
    """By how much the codes of ``_widened`` are larger."""
    return int(own.weight.table()[0] - wide.weight.table()[0])


class CpuBlocks:
    """See the module docstring."""

    name = "cpu_blocks"
    computes = "as stored"
    layout = 2
    steady = True
    runs = "quantized"

    def serves(self, device: torch.device) -> bool:
        """CPUs."""
        return device.type == "cpu"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the scheme cannot run here, or None."""
        if reason := packed_linear.unusable(device):
            return reason
        if len(shape) != 2:
            return "stacked experts"
        if scheme.is_dense:
            return "weights are not quantized"
        if scheme.activation is not None:
            return f"the scheme quantizes its input ({scheme.activation})"
        if scheme.scattered:
            return "the rows of a block lie apart"
        native = _native(scheme, shape)
        if native is None:
            return f"no packed layout for {scheme.weight.name}"
        described = _describe(native, shape)
        if isinstance(described, str):
            return described
        # Padding to whole tiles is not growth of the layout, nor is a scale for each row where all have one
        # (as neighbours that were fused have it): judge a weight of whole tiles and rows.
        tall = (-(-shape[0] // 16) * 16, -(-shape[1] // COLUMNS) * COLUMNS)
        rows = replace(scheme, blocks=tuple((height or 1, width) for height, width in scheme.blocks))
        own = rows.bits_per_weight(tall) * tall[0] * tall[1] / 8
        if described.nbytes > _LARGEST_GROWTH * own:
            return f"would take {described.nbytes} bytes, the scheme's own are {own:.0f}"
        return None

    def rounds(self, scheme: Scheme) -> bool:
        """Never: codes are exact, scales are applied in float32."""
        return False

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles and the scales between them."""
        native = _native(scheme, shape)
        described = "" if native is None else _describe(native, shape)
        assert isinstance(described, Description), "refuses() was asked first"
        return described.nbytes

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Whether the codes are whole numbers, or halves of them."""
        native = _native(scheme, shape)
        described = "" if native is None else _describe(native, shape)
        if native is None or isinstance(described, str):
            return False
        table = _table(native.weight)
        described.table = table.data_ptr()
        return packed_linear.takes(described, packed_linear.INPUT_GROUPS)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes, scales and offsets in the kernel's layout."""
        scheme = _native(weight.scheme, weight.shape)
        assert scheme is not None, "refuses() was asked first"
        description = _describe(scheme, weight.shape)
        assert isinstance(description, Description), "refuses() was asked first"
        whole = _taken_apart(weight) if description.codes in GRIDS else _fold(in_rows(weight.expand()))
        if scheme.blocks != whole.scheme.blocks:
            whole = _regrouped(whole, scheme)
        if description.codes not in GRIDS:
            whole = _recoded(whole, scheme)
        parts = _parts(whole, scheme, description)
        buffers = {"data": packed_linear.pack(description, parts), "table": _table(scheme.weight)}
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order.clone()
        if _has_row_scale(scheme):
            buffers["row_scale"] = weight.scales[1].float().flatten().expand(weight.shape[0]).contiguous()
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        native_scheme = _native(scheme, shape)
        described = "no packed layout" if native_scheme is None else _describe(native_scheme, shape)
        if isinstance(described, str):
            raise ValueError(f"{origin}: {described}")
        row_scale, order = buffers.get("row_scale"), buffers.get("column_order")
        if row_scale is not None and row_scale.numel() != shape[0]:
            raise ValueError(f"{origin}: {row_scale.numel()} scales of {shape[0]} rows")
        if order is not None and not _is_order(order, shape[1]):
            raise ValueError(f"{origin}: no order of {shape[1]} columns")
        return packed_linear.around(self, described, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, block formats expanded."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        scheme = _native(packed.scheme, packed.shape)
        assert scheme is not None, "it was packed"
        read = packed_linear.unpack(packed)
        assert read.scales is not None, "every scheme here has scales"
        # Blocks of several rows were spread over their rows, exactly.
        scheme = replace(scheme, blocks=tuple((1, columns) for _, columns in scheme.blocks))
        codes, inner = read.codes, read.scales
        if packed.description.codes in GRIDS:
            codes = _from_grid(codes, packed.scheme.weight.name)
        own = _expanded(packed.scheme)
        if own is not None and own.weight != scheme.weight:
            codes = codes - _moved_by(own, scheme)
            scheme = replace(scheme, weight=own.weight)
        if packed.description.nibbles:
            inner = scheme.scales[0].table()[inner.long()]
        scales = [inner] + ([] if read.outer_scales is None else [read.outer_scales])
        if "row_scale" in packed.buffers:
            scales.append(packed.buffers["row_scale"].unsqueeze(1))
        addends = [a for a in (read.addends, read.outer_addends) if a is not None]
        if packed.description.nibbles and addends:
            addends[0] = -addends[0].float()
        zeros = None if scheme.zero == "none" else addends.pop(0)
        if scheme.zero == "integer":
            zeros = None if zeros is None else zeros.to(torch.uint8)
        return QuantizedTensor(
            scheme,
            packed.shape,
            codes,
            tuple(scales),
            zeros,
            tuple(addends),
            packed.buffers.get("column_order"),
            packed.origin,
        )

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        return packed_linear.linear(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        return packed_linear.rows(packed, ids)


def _parts(weight: QuantizedTensor, scheme: Scheme, description: Description) -> Parts:
    """The tensors in the dtypes the native packer reads, one scale for each row and group."""
    two_level = description.super_size > 0
    dtype = torch.uint8 if description.nibbles else torch.int8 if two_level else None
    dtype = dtype or SCALE_DTYPES[description.scales]
    groups = description.columns // description.group

    def per_row(tensor: Tensor, level: int, dtype: torch.dtype) -> Tensor:
        rows = scheme.blocks[level][0]
        if rows != 1:
            tensor = tensor.repeat_interleave(rows or weight.shape[0], 0)[: weight.shape[0]]
        # float8 scales go through float32, which holds them exactly
        wide = tensor.float() if tensor.dtype.itemsize == 1 and not two_level else tensor
        if level == 0 and tensor.shape[1] < groups:
            wide = torch.nn.functional.pad(wide, (0, groups - tensor.shape[1]))
        return wide.to(dtype).contiguous()

    addend = None
    if weight.zeros is not None:
        addend = per_row(weight.zeros, 0, torch.float16)
    elif weight.offsets:
        addend = per_row(-weight.offsets[0] if description.nibbles else weight.offsets[0], 0, dtype)
    f16, scale = torch.float16, weight.scales[0]
    if description.nibbles:
        first, second = (scheme.scales[0].values or ())[:2]
        scale = (scale - first) / (second - first)
    return Parts(
        weight.codes.contiguous(),
        per_row(scale, 0, dtype),
        addend,
        per_row(weight.scales[1], 1, f16) if two_level else None,
        per_row(weight.offsets[1], 1, f16) if two_level and weight.offsets else None,
    )
