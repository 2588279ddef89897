"""What the native linear kernels share: packing, multiplying and looking up rows (csrc/linear.cpp).

A weight is cut into blocks of 16 output rows; a block is one sequential stream of tiles of 32 columns, each
group's scales (and offsets or zero points) for the 16 rows standing before its tiles:

    block of 16 rows:  [outer scales, 256 columns][scales][offsets] tile tile … [scales][offsets] tile …

In a tile, a 16-bit word belongs to a (row, column parity) and holds one code for each of several pairs of
columns: one load and a few shifts give whole registers of 16 rows by 2 columns, ready for a bfloat16 dot
product. A pair and the one two further lie in the same place of the word's two bytes, so that the same
register is four columns of bytes for an int8 dot product. 4-bit codes lie 4 a word; 3, 5, 6 and 7 bits are
planes of 2 + 1, 4 + 1, 4 + 2 and 4 + 2 + 1 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.activation_native import NativeQuantizer
from lowbit.kernels.elementwise import affine, gather_columns
from lowbit.kernels.host_memory import for_weight
from lowbit.kernels.linear_kernel import LinearKernel, PackedWeight
from lowbit.kernels.prompt_rows import first_prompt_row
from lowbit.kernels.step_plan import Operation
from lowbit.numerics.number_formats import VectorLayout
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import TrellisLayout

ROWS, COLUMNS, SUPER = 16, 32, 256
TABLE_BYTES = 128  # 64 values in bfloat16; or 32 of 16 bits and 16 in float32

LARGEST_VALUE = 4095  # of a table of whole numbers (csrc/linear_words.h)

# The numbers of csrc/linear_tiles.h and csrc/linear_layout.h.
CODES = {"bits1": 1, "bits2": 2, "bits3": 3, "bits4": 4, "bits5": 5, "bits6": 6, "bits7": 7}
CODES |= {"int8": 8, "uint8": 9, "e4m3": 10, "e5m2": 11, "e4m3fnuz": 12, "e5m2fnuz": 13, "words4": 14}
CODES |= {"row_vectors": 40}
DENSE_CODES = {"bf16": 16, "f16": 17, "f32": 32}
SCALES_NONE, SCALES_F16, SCALES_BF16, SCALES_F32, SCALES_TWO_LEVEL, SCALES_E4M3 = range(6)
SCALES_NIBBLES, SCALES_ODD_NIBBLES = 6, 7
ADDEND_NONE, ADDEND_OFFSET, ADDEND_ZERO = range(3)
SCALE_KINDS = {"f16": SCALES_F16, "bf16": SCALES_BF16, "f32": SCALES_F32}  # by the number format's name
SCALE_DTYPES = {
    SCALES_F16: torch.float16,
    SCALES_BF16: torch.bfloat16,
    SCALES_F32: torch.float32,
    SCALES_E4M3: torch.float8_e4m3fn,
}

_PLANES = {
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
}
_PLANES |= {7: ((4, 0), (2, 4), (1, 6)), 14: _PLANES[4], 18: _PLANES[3]}


def planes(codes: int) -> tuple[tuple[int, int], ...]:
    """Bits of each plane of such codes, and their place in the code."""
    return _PLANES[codes]


@dataclass(frozen=True)
class Grid:
    """``Grid`` of csrc/linear_tiles.h: 2^bits vectors of ``numbers`` columns."""

    bits: int
    numbers: int
    shifted: bool = False
    books: int = 1

    @property
    def vectors(self) -> int:
        """Of a tile."""
        return ROWS * COLUMNS // self.numbers

    @property
    def share(self) -> int:
        """Bits of a vector's index that a column's byte holds for the packer."""
        return 2 if self.numbers == 8 else 3

    @property
    def tile_size(self) -> int:
        """Bytes of a tile's codes."""
        return self.books * self.vectors // 8 * (self.bits + (1 if self.shifted else self.numbers))


GRIDS = {
    20: Grid(8, 8),
    21: Grid(9, 8),
    22: Grid(10, 8),
    23: Grid(11, 8, True),
    24: Grid(8, 4),
    25: Grid(9, 4),
    26: Grid(8, 8),
    27: Grid(8, 8, books=2),
}
CODES |= {
    "grid2_256": 20,
    "grid2_512": 21,
    "grid2_1024": 22,
    "grid1_2048": 23,
    "grid3_256": 24,
    "grid3_512": 25,
    "e8p": 26,
    "e8p_pair": 27,
}


# Codes of codebooks say what they are: VECTORS + books, bits and log2(length / 2) (csrc/linear_vectors.h).
VECTORS = 1 << 16
VECTOR_LENGTHS = (2, 4, 8, 16, 32)
SHORT_LENGTHS = (2, 4)  # of one codebook of SHORT_VECTORS, whose bytes lie behind it plane by plane
SHORT_VECTORS = 256
MOST_BOOKS = 4  # of more, the whole numbers would be too coarse


def vector_codes(layout: VectorLayout) -> int:
    """The number in ``CODES`` of such indices."""
    return VECTORS | layout.books << 8 | layout.bits << 3 | VECTOR_LENGTHS.index(layout.length)


def vectors_of(codes: int) -> VectorLayout | None:
    """What ``vector_codes`` had, or None."""
    if codes < VECTORS:
        return None
    return VectorLayout(codes >> 8 & 255, codes >> 3 & 31, VECTOR_LENGTHS[codes & 7])


# Codes of trellises: TRELLISES + 16 times the code book's number + bits (csrc/linear_tiles.h).
TRELLISES = 64
TRELLIS_BOOKS = ("3inst", "mcg", "mul1")


def trellis_codes(layout: TrellisLayout) -> int:
    """The number in ``CODES`` of such a trellis."""
    return TRELLISES + 16 * TRELLIS_BOOKS.index(layout.book) + layout.bits


class Description(ctypes.Structure):
    """``lowbit_weight`` of csrc/linear_layout.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("codes", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scales", ctypes.c_int32),
        ("addend", ctypes.c_int32),
        ("input", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("input_group", ctypes.c_int32),
        ("quantizer", ctypes.c_void_p),
        ("row_vectors", ctypes.c_void_p),
        ("outlier_starts", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
    )

    @staticmethod
    def plain(
        shape: tuple[int, ...],
        codes: int,
        scales: int = SCALES_NONE,
        group: int | None = None,
        factor: float = 1.0,
    ) -> Description:
        """Of codes to which nothing is added, in whole tiles; columns share a scale but for ``group``."""
        padded = -(-shape[1] // COLUMNS) * COLUMNS
        group = padded if group is None else group
        return Description(
            None, None, shape[0], padded, codes, group, scales, ADDEND_NONE, INPUT_BFLOAT, factor
        )

    @property
    def scale_size(self) -> int:
        """Bytes of one group's 16 scales."""
        sizes = {SCALES_NONE: 0, SCALES_F32: 64, SCALES_TWO_LEVEL: 16, SCALES_E4M3: 16}
        return 8 if self.nibbles else sizes.get(self.scales, 32)

    @property
    def nibbles(self) -> bool:
        """Whether inner scales have 4 bits."""
        return self.scales in (SCALES_NIBBLES, SCALES_ODD_NIBBLES)

    @property
    def table_size(self) -> int:
        """Bytes of the table, and of the words behind it."""
        if (layout := vectors_of(self.codes)) is not None:
            if layout.length in SHORT_LENGTHS:
                return 2 * 2 * SHORT_VECTORS * layout.length
            return 2 * max(64, layout.books * (layout.length << layout.bits))
        words = 128 if self.codes == CODES["bits7"] else 0
        return TABLE_BYTES + 2 * (1 << GRIDS[self.codes].bits if self.codes in GRIDS else words)

    @property
    def addend_size(self) -> int:
        """Bytes of one group's 16 offsets or zero points."""
        return {ADDEND_NONE: 0, ADDEND_OFFSET: self.scale_size, ADDEND_ZERO: 32}[self.addend]

    @property
    def super_size(self) -> int:
        """Bytes of the outer scales (and offsets) of 16 rows."""
        if self.scales != SCALES_TWO_LEVEL and not self.nibbles:
            return 0
        return 64 if self.addend == ADDEND_OFFSET else 32

    @property
    def unit(self) -> int:
        """Columns whose scales stand together."""
        return max(self.group, COLUMNS)

    @property
    def tile_size(self) -> int:
        """Bytes of a tile's codes."""
        if self.codes in GRIDS:
            return GRIDS[self.codes].tile_size
        if (layout := vectors_of(self.codes)) is not None:
            return ROWS * layout.row_bytes(COLUMNS)
        bits = {**dict.fromkeys(range(8, 14), 8), 14: 4, 17: 16, 18: 3}.get(self.codes, self.codes)
        if self.codes >= TRELLISES:
            bits = self.codes % 16
        return ROWS * COLUMNS * bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        headers = self.unit // self.group * (self.scale_size + self.addend_size)
        unit = headers + self.unit // COLUMNS * self.tile_size
        block = self.columns // self.unit * unit
        if self.super_size:
            block += self.columns // SUPER * self.super_size
        return -(-self.rows // ROWS) * block


# What a weight is multiplied with: x in bfloat16 (float32 beside float codes), x in int8 with a scale for
# each token and 32 columns, x that holds whole numbers of -128 … 127 already, x in float32 (int8 codes),
# whole numbers of 15 or 16 bits with a scale for each token and 32 columns, or codes and scales that the
# kernel has a quantizer make of x. A weight that takes words meets them in bfloat16's place.
INPUT_BFLOAT, INPUT_GROUPS, INPUT_CODES, INPUT_FLOATS, INPUT_WORDS, INPUT_SCALED = range(6)


@dataclass(frozen=True)
class NativeWeight(PackedWeight):
    """A PackedWeight with the struct the native code reads; ``columns``: the logical ones."""

    description: Description = field(default_factory=Description, repr=False)
    address: int = 0
    columns: int = 0
    quantizers: list[NativeQuantizer] = field(default_factory=list, repr=False)  # kept for their addresses
    height: int = field(default=ROWS, kw_only=True)  # rows of a block

    @property
    def halves(self) -> bool:
        """Whether its rows can be a gate's and as many others'."""
        return self.shape[0] % (2 * self.height) == 0


@dataclass(frozen=True)
class _Functions:
    size: Callable[..., int]
    pack: Callable[..., None]
    linear: Operation
    rows: Operation
    takes: Callable[..., int]


@cache
def functions() -> _Functions | None:
    """The native functions, or None where there is no library."""
    library = native.library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_linear_bytes.argtypes = (pointer,)
    library.lowbit_linear_bytes.restype = number
    library.lowbit_linear_pack.argtypes = (pointer, number, *(pointer,) * 6)
    library.lowbit_linear_pack.restype = None
    library.lowbit_linear_takes.argtypes = (pointer, ctypes.c_int32)
    multiply = (pointer, pointer, number, number, number, pointer, number, number)
    look_up = (pointer, number, pointer, ctypes.c_int32, number, *(pointer,) * 3)
    return _Functions(
        library.lowbit_linear_bytes,
        library.lowbit_linear_pack,
        Operation(library, "linear", multiply, _fault),
        Operation(library, "linear_rows", look_up, _fault),
        library.lowbit_linear_takes,
    )


def _fault(status: int) -> Exception:
    if status == 1:
        return MemoryError("no memory for a product's input")
    return LowbitError("E0703", "a row outside the embedding was asked for")


def unusable(device: torch.device) -> str | None:
    """Why no native kernel can run there, or None."""
    if device.type != "cpu":
        return f"runs on a CPU, the device is {device.type}"
    return None if functions() is not None else "the native library is not there"


def unfit(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Why no native kernel of quantized weights can run it, whatever its codes are; or None."""
    if reason := unusable(device):
        return reason
    if len(shape) != 2:
        return "stacked experts"
    if scheme.is_dense:
        return "weights are not quantized"
    return None if scheme.activation is None else f"the scheme quantizes its input ({scheme.activation})"


def takes(description: Description, kind: int) -> bool:
    """Whether a weight so described can meet x as ``kind``; its table must be there."""
    loaded = functions()
    return loaded is not None and bool(loaded.takes(ctypes.addressof(description), kind))


def set_input(packed: PackedWeight, kind: int) -> bool:
    """Multiply the weight with x as ``kind`` from now on; False where it cannot be."""
    if not isinstance(packed, NativeWeight) or not takes(packed.description, kind):
        return False
    packed.description.input = kind
    return True


def set_quantizer(packed: PackedWeight, quantizer: NativeQuantizer, group: int) -> bool:
    """Let the kernel quantize x itself, in groups of columns; False where it cannot."""
    if not isinstance(packed, NativeWeight) or "column_order" in packed.buffers:
        return False
    multiplier = quantizer.buffers.multiplier
    assert multiplier is None or len(multiplier) == packed.columns, "a multiplier is as wide as x"
    described = packed.description
    described.input_group, described.quantizer = group, quantizer.address
    packed.quantizers[:] = [quantizer]
    return set_input(packed, INPUT_SCALED)


@dataclass(frozen=True)
class Parts:
    """What is packed: contiguous CPU tensors in the dtypes the description names."""

    # (rows, columns): uint8 codes, or the dense matrix. Of a grid a byte is a number's last bit, and above it
    # ``share`` bits of its vector's index.
    codes: Tensor
    scales: Tensor | None = None  # (rows, groups)
    addends: Tensor | None = None
    outer_scales: Tensor | None = None  # (rows, columns / 256) f16
    outer_addends: Tensor | None = None


def pack(description: Description, parts: Parts) -> Tensor:
    """uint8 (bytes,): the packed weight; ``description.data`` then points at it."""
    loaded = functions()
    assert loaded is not None, "refuses() was asked first"
    data = for_weight(description.nbytes)
    assert loaded.size(ctypes.addressof(description)) == data.numel(), "both sides compute the same layout"

    def address(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous() and tensor.device.type == "cpu", "the packer reads plain memory"
        return tensor.data_ptr()

    loaded.pack(
        ctypes.addressof(description),
        parts.codes.shape[-1],
        address(parts.codes),
        address(parts.scales),
        address(parts.addends),
        address(parts.outer_scales),
        address(parts.outer_addends),
        data.data_ptr(),
    )
    description.data = data.data_ptr()
    return data


def around(
    kernel: LinearKernel,
    description: Description,
    scheme: Scheme,
    shape: tuple[int, ...],
    buffers: dict[str, Tensor],
    origin: str,
) -> NativeWeight:
    """The weight whose bytes are ``buffers``: "data", the "table" of code values, and what a kernel adds.

    ValueError where the bytes are not as many as the description's.
    """
    data, table = buffers["data"], buffers["table"]
    if (
        data.dtype is not torch.uint8
        or data.numel() != description.nbytes
        or table.nbytes != description.table_size
    ):
        raise ValueError(f"{origin}: {data.numel()} packed bytes instead of {description.nbytes}")
    description.data, description.table = data.data_ptr(), table.data_ptr()
    return NativeWeight(
        kernel,
        scheme,
        shape,
        buffers,
        origin,
        description,
        ctypes.addressof(description),
        shape[-1],
    )


def check_buffers(
    buffers: dict[str, Tensor], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], origin: str
) -> None:
    """ValueError where one of ``wanted`` is not there in this shape and type."""
    for name, (shape, dtype) in wanted.items():
        found = buffers.get(name)
        if found is None or found.shape != shape or found.dtype is not dtype:
            raise ValueError(f"{origin}: {name} is no {dtype} of {list(shape)}")


def check_order(order: Tensor | None, columns: int, origin: str) -> None:
    """ValueError where there is an order and it is none of so many columns."""
    if order is None:
        return
    if order.dtype is not torch.int64 or not torch.equal(order.sort().values, torch.arange(columns)):
        raise ValueError(f"{origin}: no order of {columns} columns")


def check_columns(x: Tensor, packed: PackedWeight) -> None:
    """LowbitError where x is not as wide as the weight."""
    if x.shape[1] != packed.shape[1]:
        raise LowbitError(
            "E0703", f"{packed.origin}: input has {x.shape[1]} columns, weight {packed.shape[1]}"
        )


def check_rows(ids: Tensor, packed: PackedWeight) -> Tensor:
    """``ids`` as int64; LowbitError where the weight has no such row."""
    wanted = ids.long()
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < packed.shape[0]:
        raise _no_row(packed)
    return wanted


def _no_row(packed: PackedWeight) -> LowbitError:
    return LowbitError("E0703", f"{packed.origin}: a row outside 0..{packed.shape[0] - 1} was asked for")


def operands(x: Tensor, packed: PackedWeight, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (tokens, in) and a result (tokens, out) as native code has them: float32, rows without gaps."""
    check_columns(x, packed)
    if x.dtype is not torch.float32:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    shape = (len(x), packed.shape[0])
    if out is None:
        out = torch.empty(shape)
    assert out.dtype is torch.float32 and out.stride(1) == 1 and out.shape == shape
    return x, out


def linear(x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
    """x float32 (tokens, in) -> float32 (tokens, out)."""
    assert isinstance(packed, NativeWeight), "packed by a native kernel"
    order = packed.buffers.get("column_order")
    if order is not None:
        x = gather_columns(x, order)
    x, out = operands(x, packed, out)
    (tokens, columns), loaded = x.shape, functions()
    assert loaded is not None, "packed by a native kernel"
    prompts = first_prompt_row(tokens)
    loaded.linear(
        packed.address, x.data_ptr(), tokens, x.stride(0), columns, out.data_ptr(), out.stride(0), prompts
    )
    row_scale = packed.buffers.get("row_scale")
    return out if row_scale is None else affine(out, column=row_scale, out=out)


def rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """float32 (len(ids), in)."""
    assert isinstance(packed, NativeWeight), "packed by a native kernel"
    wanted = ids.contiguous() if ids.dtype in (torch.int32, torch.int64) else ids.long().contiguous()
    row_scale, order = packed.buffers.get("row_scale"), packed.buffers.get("column_order")
    assert order is None or order.dtype is torch.int64, "an order is int64"
    out = torch.empty(len(wanted), packed.columns)
    loaded = functions()
    assert loaded is not None, "packed by a native kernel"
    try:
        loaded.rows(
            packed.address,
            packed.columns,
            wanted.data_ptr(),
            wanted.dtype is torch.int64,
            len(wanted),
            None if row_scale is None else row_scale.data_ptr(),
            None if order is None else order.data_ptr(),
            out.data_ptr(),
        )
    except LowbitError:
        raise _no_row(packed) from None
    return out
