"""What torchao's metadata say of a weight: its class, attributes, and the rule for its inputs.

``torchao`` shows the classes and how their tensors lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.checkpoint.documents import parse_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.formats.matching import spellings
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme
from lowbit.numerics.torchao_inputs import (
    MX_MODES,
    PER_ROW,
    PER_TENSOR,
    float8_inputs,
    int8_inputs,
    int8_inputs_with_zeros,
    mx_inputs,
)

Json = dict[str, object]

INT8, FLOAT8, INT4, INTX = "Int8Tensor", "Float8Tensor", "Int4Tensor", "IntxUnpackedToInt8Tensor"
TILES = "Int4TilePackedTo4dTensor"
MX, NVFP4 = "MXTensor", "NVFP4Tensor"
READ = (INT8, FLOAT8, INT4, INTX, TILES, MX, NVFP4)
# elem_dtype of MXTensor -> (the code, the dtype it is stored in, how many to a byte)
ELEMENTS = {
    "float8_e4m3fn": ("e4m3", "F8_E4M3", 1),
    "float8_e5m2": ("e5m2", "F8_E5M2", 1),
    "fp6_e2m3": ("e2m3", "U8", 1),
    "fp6_e3m2": ("e3m2", "U8", 1),
    "float4_e2m1fn_x2": ("e2m1", "U8", 2),
}
_OLD = (
    "is of a torchao whose files later versions do not load either; quantize the original model with torchao "
    "0.15 or newer, or at load (--torchao-config)"
)
REFUSED = {
    "AffineQuantizedTensor": _OLD,
    "LinearActivationQuantizedTensor": _OLD,
    "Int4PlainInt32Tensor": "is packed for XPU and NPU kernels; quantize the original model with "
    "Int4WeightOnlyConfig(int4_packing_format=PLAIN), or at load with --torchao-config int4wo-128",
}


@dataclass(frozen=True)
class Stored:
    """A tensor subclass as the metadata describe it. ``place``: file and parameter, for messages. ``parts``:
    the tensors it says to have; pickled objects say nothing, and lose none."""

    kind: str
    data: Json
    place: str
    parts: tuple[str, ...] = ()

    def refuse(self, what: str) -> LowbitError:
        """E0218: a variant that is not read."""
        return LowbitError("E0218", f"{self.place}: {what}")

    def wrong(self, key: str, expected: str) -> LowbitError:
        """E0213: an attribute that cannot be."""
        found = printable(repr(self.data.get(key)))
        return LowbitError(
            "E0213",
            f"{self.place}: {self.kind}'s {key} must be {expected}, found {found}; the file is damaged or "
            "was made by a faulty tool",
        )

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a block, checked to divide the weight."""
        found = self.data.get("block_size")
        rows_columns = found if isinstance(found, list) and len(found) == 2 else [0, 0]
        sizes = [size for size in rows_columns if isinstance(size, int) and not isinstance(size, bool)]
        if len(sizes) != 2 or any(size < 1 or whole % size for size, whole in zip(sizes, shape, strict=True)):
            raise self.wrong("block_size", f"two divisors of {list(shape)}")
        return sizes[0], sizes[1]

    def group(self, columns: int) -> int:
        """Columns of a block of a row, checked to divide them."""
        size = self.data.get("block_size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or columns % size:
            raise self.wrong("block_size", f"a divisor of {columns}")
        if self.kind == NVFP4 and size != 16:
            raise self.wrong("block_size", "16")
        return size

    @property
    def element(self) -> tuple[str, str, int]:
        """What ``ELEMENTS`` has of it."""
        if self.kind == NVFP4:
            return ELEMENTS["float4_e2m1fn_x2"]
        found = ELEMENTS.get(dtype_of(self.data.get("elem_dtype")))
        if found is None:
            raise self.wrong("elem_dtype", f"one of {', '.join(ELEMENTS)}")
        return found

    @property
    def tiled(self) -> bool:
        """Whether scales lie in tiles."""
        found = self.data.get("is_swizzled_scales")
        if not isinstance(found, bool):
            raise self.wrong("is_swizzled_scales", "true or false")
        return found


def described(header: CheckpointHeader) -> dict[str, Stored]:
    """Parameter name -> what it was, of all the metadata's tensor subclasses."""
    found: dict[str, Stored] = {}
    for name, text in header.metadata.items():
        if not isinstance(text, str) or "." not in name or not text.startswith("{"):
            continue
        place = f"{header.root.name}: __metadata__ of {printable(repr(name))}"
        said = parse_json(text.encode(), place)
        assert isinstance(said, dict), "it starts as an object"
        kind = said.get("_type")
        if kind == "Tensor":
            continue
        data = said.get("_data")
        if not isinstance(data, dict) or not isinstance(kind, str):
            raise LowbitError("E0213", f"{place} has no _type or no _data; the file is damaged")
        if kind not in READ and kind not in REFUSED:
            raise LowbitError(
                "E0218",
                f"{place}: tensors of class {printable(repr(kind))} are not read; known are "
                + ", ".join(READ),
            )
        parts = said.get("_tensor_data_names") or []
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise LowbitError("E0213", f"{place}: _tensor_data_names must be a list of names")
        found[_where_stored(header, name)] = Stored(kind, data, place, tuple(parts))
    return found


def _where_stored(header: CheckpointHeader, name: str) -> str:
    """The parameter under the name its parts have."""
    stem = name.removesuffix(".weight")
    names = (f"{other}._weight_qdata" for other in spellings(stem))
    part = next((part for part in names if part in header.tensors), None)
    return name if part is None or stem == name else f"{part.removesuffix('._weight_qdata')}.weight"


def asked_for(values: Json) -> str:
    """The name of torchao's config, for people."""
    asked = values.get("quant_type")
    if isinstance(asked, dict):
        asked = asked.get("default")
    if isinstance(asked, dict):
        asked = asked.get("_type")
    return printable(asked) if isinstance(asked, str) else ""


def dtype_of(value: object) -> str:
    """``{"_type": "torch.dtype", "_data": "int4"}`` -> int4; "" for null."""
    if isinstance(value, dict) and value.get("_type") == "torch.dtype":
        value = value.get("_data")
    return "" if value is None else str(value).removeprefix("torch.")


def _kwargs(stored: Stored, kind: str) -> Json | None:
    """The attributes of ``act_quant_kwargs``; None: inputs stay as they are."""
    found = stored.data.get("act_quant_kwargs")
    if found is None:
        return None
    inner = found.get("_data") if isinstance(found, dict) and found.get("_type") == kind else None
    if not isinstance(inner, dict):
        raise stored.wrong("act_quant_kwargs", f"null or {kind}")
    return inner


def _granularity(stored: Stored, kwargs: Json) -> tuple[int, int]:
    found = kwargs.get("granularity")
    kind = found.get("_type") if isinstance(found, dict) else None
    more = found.get("_data") if isinstance(found, dict) else None
    if kind == "PerTensor":
        return PER_TENSOR
    if kind == "PerRow" and (not isinstance(more, dict) or more.get("dim", -1) == -1):
        return PER_ROW
    raise stored.refuse(
        f"inputs with {printable(repr(kind))} scales are not computed; PerRow and PerTensor are"
    )


def int8_inputs_of(stored: Stored) -> ActivationScheme | None:
    """Of Int8Tensor."""
    kwargs = _kwargs(stored, "QuantizeTensorToInt8Kwargs")
    if kwargs is None:
        return None
    mapping = _member(kwargs.get("mapping_type"))
    if mapping not in ("SYMMETRIC", "ASYMMETRIC") or kwargs.get("reduce_range"):
        raise stored.refuse(
            "int8 inputs that are reduced-range, or without clipping errors, are not computed; use a "
            "version with symmetric or asymmetric ones"
        )
    block = _granularity(stored, kwargs)
    if mapping == "SYMMETRIC":
        return int8_inputs(block)
    if block != PER_ROW:
        raise stored.refuse("asymmetric int8 inputs are computed per row; use a version with PerRow")
    return int8_inputs_with_zeros()


def float8_inputs_of(stored: Stored) -> ActivationScheme | None:
    """Of Float8Tensor."""
    kwargs = _kwargs(stored, "QuantizeTensorToFloat8Kwargs")
    if kwargs is None:
        return None
    dtype, upper = dtype_of(kwargs.get("float8_dtype")), kwargs.get("hp_value_ub")
    if dtype != "float8_e4m3fn" or kwargs.get("hp_value_lb") is not None:
        raise stored.refuse(
            f"inputs as {printable(dtype)}, or with a lower bound for their scales, are not computed; use a "
            "version with plain e4m3 inputs"
        )
    if upper is not None and (
        isinstance(upper, bool) or not isinstance(upper, int | float) or not 0 < upper < math.inf
    ):
        raise stored.wrong("act_quant_kwargs", "with null or a positive number as hp_value_ub")
    return float8_inputs(_granularity(stored, kwargs), float(upper or 0.0))


def mx_inputs_of(stored: Stored, columns: int) -> ActivationScheme | None:
    """Of MXTensor of so many columns, which their blocks divide too."""
    kwargs = _kwargs(stored, "QuantizeTensorToMXKwargs")
    if kwargs is None:
        return None
    element, size = ELEMENTS.get(dtype_of(kwargs.get("elem_dtype"))), kwargs.get("block_size")
    mode = str(_member(kwargs.get("scaling_mode"))).lower()
    whole = isinstance(size, int) and not isinstance(size, bool) and size > 0 and columns % size == 0
    if element is None or not whole or mode not in MX_MODES:
        raise stored.wrong(
            "act_quant_kwargs",
            f"with an elem_dtype of {', '.join(ELEMENTS)}, a block_size that divides {columns} and a "
            f"scaling_mode of {', '.join(MX_MODES)}",
        )
    assert isinstance(size, int), "it is whole"
    return mx_inputs(number_format(element[0]), size, mode)


def nvfp4_inputs_of(stored: Stored) -> ActivationScheme | None:
    """Of NVFP4Tensor; None too where they would be under a scale of all tokens (``needs_all_tokens``)."""
    kwargs = _kwargs(stored, "QuantizeTensorToNVFP4Kwargs")
    if kwargs is None:
        return None
    whole = kwargs.get("use_dynamic_per_tensor_scale")
    if kwargs.get("block_size") != 16 or not isinstance(whole, bool):
        raise stored.wrong(
            "act_quant_kwargs", "with block_size 16 and use_dynamic_per_tensor_scale true or false"
        )
    if whole:
        return None
    return ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3"))


def needs_all_tokens(stored: Stored) -> bool:
    """Whether inputs are quantized under one scale for all tokens of a step, which is not done."""
    return stored.kind == NVFP4 and bool(
        (_kwargs(stored, "QuantizeTensorToNVFP4Kwargs") or {}).get("use_dynamic_per_tensor_scale")
    )


def _member(value: object) -> object:
    """``{"_type": enum, "_data": name}`` -> the name."""
    return value.get("_data") if isinstance(value, dict) else value
