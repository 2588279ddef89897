"""Sparse Marlin under GPTQ's config (``checkpoint_format`` marlin_24): two of each four columns, 4 or 8 bits.

    B_24    I32 [in / 32, out * bits / 2]   codes of what is kept
    B_meta  I16 [in / 32, out * 2]          which columns they are of
    s       F16 [groups, out]               symmetric, group 128 or the whole input

``compressed_tensors_sparse`` shows how codes and places lie: they are marlin-24's there. Scales of groups are
shuffled by (0 4 1 5 2 6 3 7) within 8 rows of the weight, also where there are two groups, unlike there.
Source: vLLM's gptq_marlin_24 and its packing (marlin_utils_test_24).
"""

from __future__ import annotations

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.compressed_tensors_sparse import unpack_marlin24, unshuffle_marlin24_scales
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import refuse_stack
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_NAMES = ("B_24", "B_meta", "s")
_SCALE_DTYPES = {"F16": "f16", "BF16": "bf16"}


def marlin_24_scheme(header: CheckpointHeader, module: StoredModule, bits: int, group: int) -> Scheme:
    """Codes under scales of ``group`` columns; every tensor checked."""
    out, columns = module.shape
    refuse_stack(module, "sparse Marlin packing")
    what = f"a sparse Marlin weight of {bits} bits"
    packed = entry_of(header, module, "B_24", ("I32",), what)
    grouped = group == 128 and columns % 128 == 0
    if bits not in (4, 8) or columns % 64 or out % 64 or not (grouped or group == columns):
        raise LowbitError(
            "E0213",
            f"{packed.file.name}: {module.stored!r} is {out} x {columns} in {bits} bits, groups of {group}; "
            "sparse Marlin packs multiples of 64 x 64 in 4 or 8 bits, groups of 128 or whole rows",
        )
    check_shape(packed, (columns // 32, out * bits // 2), what)
    check_shape(entry_of(header, module, "B_meta", ("I16",), what), (columns // 32, out * 2), what)
    scale = entry_of(header, module, "s", tuple(_SCALE_DTYPES), what)
    check_shape(scale, (columns // group, out), what)
    block = (1, 0) if group == columns else (1, group)
    return Scheme(number_format(f"int{bits}"), (block,), (number_format(_SCALE_DTYPES[scale.dtype]),))


def marlin_24_tensors(module: StoredModule) -> list[str]:
    """Codes, places and scales."""
    return [module.tensor(name) for name in _NAMES]


def read_marlin_24(
    header: CheckpointHeader, module: StoredModule, data: TensorData, bits: int, group: int
) -> QuantizedTensor:
    """Codes in their columns, zeros between them."""
    scheme = marlin_24_scheme(header, module, bits, group)
    packed, meta, name = marlin_24_tensors(module)
    codes = unpack_marlin24(data.tensor(packed), data.tensor(meta), bits, module.shape)
    scales = finite_scales(header, name, data.tensor(name))
    if scales.shape[0] > 1:
        scales = unshuffle_marlin24_scales(scales)
    origin = origin_of(header, module, "B_24")
    return QuantizedTensor(scheme, module.shape, codes, (scales.T.contiguous(),), origin=origin)
