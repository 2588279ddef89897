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

Zero points and offsets multiply the sum of what x became, not of x. Then the error of x meets
table[code] - zero, which is the weight, and not table[code], which is larger where a group's weights lie to
one side of 0. Sums of whole numbers are exact in float32, so they are the same on all processors.

Outliers (SpQR) are added to weights that float16 arithmetic makes of codes. Its roundings, at most 2^-10 of a
weight together, are those of rows that are looked up alone; in products codes meet x as HQQ's do, and
outliers beside them, in float32. Scales and zero points of 16 columns, which the file has as 3 bits under
four float16 for 16 rows, take 16 bits each: 5 bits a weight with codes, and 32 for each outlier and each row.

What the tiles have no place for is packed in other words for the same numbers, where these take little
more: blocks that run over row ends as smaller ones, groups that are no whole tiles as parts of them (FP8 in
blocks of 40 columns has a scale for each 8), codes of 1, 5 or 6 bits in groups of 8 as those of 2 or 8.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels import outlier_rows, packed_linear, unpacking
from lowbit.kernels.block_description import describe, has_row_scale, parts_of
from lowbit.kernels.code_tables import value_table
from lowbit.kernels.gguf_blocks import expanded
from lowbit.kernels.grid_codes import from_grid, taken_apart
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import COLUMNS, GRIDS, Description, NativeWeight
from lowbit.kernels.repacking import fold, moved_by, packed_scheme, recoded, regrouped
from lowbit.numerics.cutting import in_rows
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import Scheme

# Packed bytes to the scheme's own; what is refused runs many times slower. FP8 whose float32 scales are
# repeated for each 8 columns grows by just less.
_LARGEST_GROWTH = 1.5


class CpuBlocks(NativeKernel):
    """See the module docstring."""

    name = "cpu_blocks"
    layout = 3

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the scheme cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        if scheme.scattered:
            return "the rows of a block lie apart"
        native = packed_scheme(scheme, shape)
        if native is None:
            return f"no packed layout for {scheme.weight.name}"
        described = describe(native, shape)
        if isinstance(described, str):
            return described
        # Padding to whole tiles is not growth of the layout, nor is a scale for each row where all have one
        # (as neighbours that were fused have it): judge a weight of whole tiles and rows.
        tall = (-(-shape[0] // 16) * 16, -(-shape[1] // COLUMNS) * COLUMNS)
        rows = replace(scheme, blocks=tuple((height or 1, width) for height, width in scheme.blocks))
        own = rows.bits_per_weight(tall) * tall[0] * tall[1] / 8
        if described.nbytes > _LARGEST_GROWTH * own:
            repeated = (
                "" if native.blocks == scheme.blocks else f" with a scale for each {described.group} columns"
            )
            return f"would take {described.nbytes} bytes{repeated}, the scheme's own are {own:.0f}"
        return None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles and the scales between them."""
        native = packed_scheme(scheme, shape)
        described = "" if native is None else describe(native, shape)
        assert isinstance(described, Description), "refuses() was asked first"
        return described.nbytes + outlier_rows.nbytes(scheme, shape)

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Whether the codes are whole numbers, or halves of them."""
        native = packed_scheme(scheme, shape)
        described = "" if native is None else describe(native, shape)
        if native is None or isinstance(described, str):
            return False
        table = value_table(native.weight)
        described.table = table.data_ptr()
        return packed_linear.takes(described, packed_linear.INPUT_GROUPS)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes, scales and offsets in the kernel's layout."""
        scheme = packed_scheme(weight.scheme, weight.shape)
        assert scheme is not None, "refuses() was asked first"
        description = describe(scheme, weight.shape)
        assert isinstance(description, Description), "refuses() was asked first"
        whole = taken_apart(weight) if description.codes in GRIDS else fold(in_rows(weight.expand()))
        if scheme.blocks != whole.scheme.blocks:
            whole = regrouped(whole, scheme)
        if description.codes not in GRIDS:
            whole = recoded(whole, scheme)
        parts = parts_of(whole, scheme, description)
        buffers = {"data": packed_linear.pack(description, parts), "table": value_table(scheme.weight)}
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order.clone()
        if weight.outliers is not None:
            buffers |= outlier_rows.buffers_of(weight.outliers)
        if has_row_scale(scheme):
            buffers["row_scale"] = weight.scales[1].float().flatten().expand(weight.shape[0]).contiguous()
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        native_scheme = packed_scheme(scheme, shape)
        described = "no packed layout" if native_scheme is None else describe(native_scheme, shape)
        if isinstance(described, str):
            raise ValueError(f"{origin}: {described}")
        row_scale = buffers.get("row_scale")
        if row_scale is not None and row_scale.numel() != shape[0]:
            raise ValueError(f"{origin}: {row_scale.numel()} scales of {shape[0]} rows")
        packed_linear.check_order(buffers.get("column_order"), shape[1], origin)
        if scheme.outliers is not None:
            outlier_rows.point(described, buffers, shape[1], origin)
        return packed_linear.around(self, described, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, block formats expanded."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        scheme = packed_scheme(packed.scheme, packed.shape)
        assert scheme is not None, "it was packed"
        read = unpacking.unpack(packed)
        assert read.scales is not None, "every scheme here has scales"
        # Blocks of several rows were spread over their rows, exactly.
        scheme = replace(scheme, blocks=tuple((1, columns) for _, columns in scheme.blocks))
        codes, inner = read.codes, read.scales
        if packed.description.codes in GRIDS:
            codes = from_grid(codes, packed.scheme.weight.name)
        own = expanded(packed.scheme)
        if own is not None and own.weight != scheme.weight:
            codes = codes - moved_by(own, scheme)
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
        outliers = None
        if scheme.outliers is not None:
            outliers = Outliers(packed.buffers["outlier_starts"], packed.buffers["outliers"])
        return QuantizedTensor(
            scheme,
            packed.shape,
            codes,
            tuple(scales),
            zeros,
            tuple(addends),
            packed.buffers.get("column_order"),
            packed.origin,
            outliers=outliers,
        )
