"""HQQ checkpoints (Badri and Shaji, 2023) as transformers 4 saves them: every HQQLinear's state in
safetensors.

    W_q     U8 (3 bits: I32; view_as_float: the same bytes as F16, BF16, F32)     packed codes
    scale, zero     F16, BF16 or F32, what the layer computes in                  one a group
    nbits, group_size, axis I32; shape I64; packing, compute_dtype … U8: the characters of a Python value
    bias

The weight (out, in) is flattened row by row and cut into groups of g. axis 1: a group is a row of the matrix
(n / g, g), scales are (n / g, 1). axis 0: a *column* of the matrix (g, n / g), scales are (1, n / g). Codes
are packed along the first dimension of that matrix in as many slabs as fit an item, the first highest:

    4 bits   item[r] = q[r] << 4 | q[r + R]                2 bits   q[r] << 6 | q[r + R] << 4 | q[r + 2 R] <<
    2 … 3 bits   ten in an int32: q[r] << 27 | q[r + R] << 24 …, the rows padded to a multiple of 10 1 bit
    eight in a byte          8, 6 and 5 bits      one a byte

    weight = (q - zero) * scale, zero a *float* in code units

That is what is read: codes, scales and zero points as stored, ``zero`` "float", so that the same numbers can
be written again. The tool computes the line in its compute_dtype, rounding difference and product; here it is
float32, which is what the tool gives for the same numbers when it is asked to compute in float32. A native
kernel subtracts the zero point from the codes as float16, which holds a float16's or (but for the tiniest) a
bfloat16's exactly; float32 ones become offsets -zero * scale (``kernels.cpu_blocks``).

axis 1: groups of a row, or along the flattened weight where a row is no whole groups. axis 0: a scale a
column where a group is one; else a group is every n / g-th number of the flat weight. Where g divides the
rows these are numbers of one column: of rows R = out / g apart, the scattered rows of a block of g (row r has
those of r mod R). ``kernels.cpu_columns`` multiplies x by the scales of each such block of rows, rounds it to
bfloat16 and subtracts the zero points' sum in float32. Where g does not divide the rows a group runs
over several columns, which no block is: read with a scale for each weight, right but as large as the float
weight, and multiplied as one in float32 (``cpu_expanded``).

The number of bits and the packing are the data's; where 8, 6 and 5 bits, or views as floats, look alike, the
config (of the layer's tag: ``self_attn.q_proj``) tells them apart, and ``nbits`` must agree. Refused:
quantized scales or zero points (never in safetensors), meta-data offloading is ignored.

HQQ's own ``qmodel.pt`` is a pickled dictionary of the layers' states, read as data by
``checkpoint.pickled_objects``: the same tensors, and the numbers as Python values. Beside it config.json says
nothing of the quantization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.documents import parse_json
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_by_tensors, quantization_config, says_method
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

# What a layer's state holds beside W_q, scale, zero and bias; little of it is needed to read the weight.
META = (
    *("nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "view_as_float"),
    *("compute_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
_NUMBERS = ("nbits", "group_size", "axis", "shape", "quant_scale", "quant_zero")
PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
BITS = tuple(PACKINGS)
_WHAT = "an HQQ weight"


@dataclass(frozen=True)
class Layout:
    """How a module lies: ``grid``: the matrix that was packed, (groups, size) or, axis 0, (size, groups)."""

    bits: int
    axis: int
    size: int
    groups: int
    scale: str  # its number format

    @property
    def grid(self) -> tuple[int, int]:
        return (self.groups, self.size) if self.axis else (self.size, self.groups)


class Hqq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "hqq"
    reference: ClassVar[str] = "hqq"
    sign: ClassVar[str] = "W_q"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = quantization_config(header)
        self.place = "qmodel.pt" if found is None else found.place
        self.rules = {} if found is None else _rules(found.values, found.place)
        require_tensors(header, (".W_q",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method hqq; or the tensors of HQQ's own file, beside which there is no config."""
        if header.container == "pickle":
            return claimed_by_tensors(header, ".W_q", cls.name)
        return says_method(header, cls.name)

    def describe(self) -> str:
        """Bits and groups, as the config has them, or each layer."""
        rules = list(self.rules.values()) or [self._said(name) for name in self.header.metadata]
        told = {f"{rule.get('nbits')}-bit {_group_words(rule.get('group_size'))}" for rule in rules if rule}
        return f"hqq, {' and '.join(sorted(told)) or 'unknown bits'} in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the dtypes and shapes of W_q and scale, and the config where they leave a choice."""
        return _scheme(module.shape, self._layout(module))

    def _tensors(self, module: StoredModule) -> list[str]:
        """The whole state of the layer."""
        names = [module.tensor(suffix) for suffix in ("W_q", "scale", "zero")]
        return names + [name for suffix in META if (name := module.tensor(suffix)) in self.header.tensors]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked and in their places, scales and zero points as stored."""
        layout = self._layout(module)
        self._check_state(module, layout, data)
        entry = self.header.tensors[module.tensor("W_q")]
        codes = unpack(data.raw(entry.name), layout.bits, layout.grid)
        if int(codes.max()) >> layout.bits:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {entry.name!r} holds code {int(codes.max())}; {layout.bits} "
                f"bits end at {(1 << layout.bits) - 1}. The codes do not match the quantization config",
            )
        scale, zero = (self._per_block(module, layout, suffix, data) for suffix in ("scale", "zero"))
        scheme = _scheme(module.shape, layout)
        return QuantizedTensor(
            scheme,
            module.shape,
            codes.reshape(module.shape),
            (scale,),
            zero,
            origin=origin_of(self.header, module, "W_q"),
            row_groups=row_groups(module.shape[0], layout.size) if scheme.scattered else None,
        )

    # ---- how it lies

    def _layout(self, module: StoredModule) -> Layout:
        refuse_stack(module, "HQQ's packing")
        weight = entry_of(self.header, module, "W_q", ("U8", "I32", *DENSE_DTYPES), _WHAT)
        scale = entry_of(self.header, module, "scale", tuple(DENSE_DTYPES), _WHAT)
        zero = entry_of(self.header, module, "zero", (scale.dtype,), f"{_WHAT} with {scale.dtype} scales")
        rule = self._rule(module)
        count = math.prod(module.shape)
        if len(scale.shape) != 2 or 1 not in scale.shape or zero.shape != scale.shape:
            raise self._wrong(scale, "(groups, 1) or (1, groups), and the zero points alike", module)
        groups = math.prod(scale.shape)
        if not groups or count % groups:
            raise self._wrong(scale, f"a number of groups that divides {count} weights", module)
        axis = 1 if scale.shape[1] == 1 else 0
        if groups == 1 and rule.get("axis") in (0, 1):
            axis = int(str(rule["axis"]))
        size = count // groups
        rows, columns = (groups, size) if axis else (size, groups)
        fits = [bits for bits in BITS if packed_bytes(bits, rows, columns) == weight.nbytes]
        fits = [bits for bits in fits if _holds(weight.dtype, bits)]
        told = rule.get("nbits")
        told = 2 if told == 1.58 else told
        bits = next((bits for bits in fits if bits == told), fits[0] if fits else 0)
        if not bits:
            raise self._wrong(weight, f"{count} codes of 1 to 8 bits in groups of {size}", module)
        if told is not None and told != bits:
            self.notes.contradiction(
                "E0214",
                f"{self.header.root.name}: {self.place} says {printable(repr(told))} bits, but "
                f"{weight.name!r} is packed as {bits}; reading what the tensors say",
            )
        return Layout(bits, axis, size, groups, DENSE_DTYPES[scale.dtype])

    def _wrong(self, entry: TensorEntry, expected: str, module: StoredModule) -> LowbitError:
        return LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; for a weight "
            f"of {list(module.shape)} {expected} are expected. The file is damaged, or config and weights "
            "are from different models",
        )

    def _rule(self, module: StoredModule) -> dict[str, object]:
        """The config's parameters for the module: its tag's, or those of all; in HQQ's own file its own."""
        told = self.rules.get(linear_tag(module.stored), self.rules.get("", {}))
        return told | self._said(module.stored)

    def _said(self, module: str) -> dict[str, object]:
        """What HQQ's own file has beside the module's tensors (``checkpoint.pickled_objects``)."""
        text = self.header.metadata.get(module)
        if self.header.container != "pickle" or not isinstance(text, str):
            return {}
        found = parse_json(text.encode(), f"{self.header.root.name}: {printable(repr(module))}")
        said = found.get("hqq") if isinstance(found, dict) else None
        return said if isinstance(said, dict) else {}

    # ---- numbers

    def _check_state(self, module: StoredModule, layout: Layout, data: TensorData) -> None:
        """What the layer says of itself must be what its tensors are."""
        file, told = self.header.file_of(module.tensor("W_q")), self._numbers_beside(module, data)
        wanted = {"group_size": [layout.size], "shape": list(module.shape)}
        if layout.groups > 1:
            wanted["axis"] = [layout.axis]
        for suffix, values in wanted.items():
            if told.get(suffix, values) != values:
                code = "E0210" if suffix == "shape" else "E0213"
                raise LowbitError(
                    code,
                    f"{file}: {module.tensor(suffix)!r} says {told[suffix]}, {values} is what the other "
                    "tensors and the model's config ask for; the file is damaged, or config and weights are "
                    "from different models",
                )
        bits = told.get("nbits", [layout.bits])
        if [round(value + 0.08) for value in bits] != [layout.bits]:  # 1.58 bits are kept as 2
            raise LowbitError(
                "E0213",
                f"{file}: {module.tensor('nbits')!r} says {bits} bits, {self.place} and the packing "
                f"{layout.bits}; correct the config",
            )
        for suffix in ("quant_scale", "quant_zero"):
            if any(told.get(suffix, [])):
                raise LowbitError(
                    "E0218",
                    f"{file}: {module.tensor(suffix)!r} is set: quantized scales and zero points are not "
                    "read; quantize the original model again, hqq 0.2 and newer leave them in floats",
                )

    def _numbers_beside(self, module: StoredModule, data: TensorData) -> dict[str, list[float]]:
        """What the layer's state says in numbers: tensors, or Python values in HQQ's own file."""
        found: dict[str, list[float]] = {}
        for suffix, said in self._said(module.stored).items():
            values = said if isinstance(said, list) else [said]
            numbers = [float(value) for value in values if isinstance(value, int | float)]
            if len(numbers) == len(values):
                found[suffix] = numbers
        for suffix in _NUMBERS:
            entry = self.header.tensors.get(module.tensor(suffix))
            if entry is not None:
                found[suffix] = _numbers(entry, data)
        return found

    def _per_block(self, module: StoredModule, layout: Layout, suffix: str, data: TensorData) -> Tensor:
        """Scales or zero points in the order of the scheme's blocks."""
        name, (out, columns) = module.tensor(suffix), module.shape
        stored = finite_scales(self.header, name, data.tensor(name)).flatten()
        scheme = _scheme(module.shape, layout)
        if scheme.flattened:
            return stored
        if layout.axis:
            return stored.view(out, -1)
        if layout.size == out:
            return stored.view(1, columns)
        if scheme.scattered:
            return stored.view(out // layout.size, columns)
        # Weight i of the flat matrix belongs to group i mod groups.
        return stored.repeat(layout.size).view(out, columns)


def _scheme(shape: tuple[int, int], layout: Layout) -> Scheme:
    (out, columns), size = shape, layout.size
    blocks, flattened = (1, size), False
    scattered = layout.axis == 0 and 1 < size < out and out % size == 0
    if layout.axis == 0:
        blocks = (0, 1) if size == out else (size, 1) if scattered else (1, 1)
    else:
        flattened = columns % size != 0
    scales = (number_format(layout.scale),)
    code = number_format(f"uint{layout.bits}")
    return Scheme(code, (blocks,), scales, zero="float", flattened=flattened, scattered=scattered)


def row_groups(rows: int, size: int) -> Tensor:
    """int64 (rows,): which row of the scales (rows / size, columns) each has, in groups of axis 0."""
    return torch.arange(rows) % (rows // size)


def linear_tag(name: str) -> str:
    """HQQ's name for one kind of layer: ``self_attn.q_proj``, whatever the layer's number."""
    words = [word for word in name.split(".") if word not in ("model", "layers") and not word.isnumeric()]
    return ".".join(words)


def per_item(bits: int) -> int:
    """Codes of an item of W_q."""
    return 10 if bits == 3 else 8 // bits if bits in (1, 2, 4) else 1


def packed_bytes(bits: int, rows: int, columns: int) -> int:
    """Bytes of a packed matrix; -1 where the rows are no whole items."""
    if bits == 3:
        return 4 * -(-rows // 10) * columns
    return -1 if rows % per_item(bits) else rows // per_item(bits) * columns


def unpack(raw: Tensor, bits: int, grid: tuple[int, int]) -> Tensor:
    """The bytes of W_q -> uint8 codes in the shape of ``grid``."""
    rows, columns = grid
    if per_item(bits) == 1:
        return raw.view(rows, columns)
    items = raw.view(torch.int32) if bits == 3 else raw
    items = items.view(-1, columns)  # (R, columns)
    count, mask = per_item(bits), (1 << bits) - 1
    slabs = [(items >> bits * (count - 1 - slab) & mask).to(torch.uint8) for slab in range(count)]
    return torch.cat(slabs)[:rows]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, columns) -> W_q: the inverse of ``unpack``."""
    count = per_item(bits)
    if count == 1:
        return codes
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count))
    slabs = padded.view(count, -1, codes.shape[1]).to(torch.int32)
    items = torch.zeros(slabs.shape[1:], dtype=torch.int32)
    for slab in range(count):
        items |= slabs[slab] << bits * (count - 1 - slab)
    return items if bits == 3 else items.to(torch.uint8)


def _holds(dtype: str, bits: int) -> bool:
    """Whether W_q of this dtype can hold codes of this width: floats are a view of either."""
    return dtype in DENSE_DTYPES or (dtype == "I32") == (bits == 3)


def _numbers(entry: TensorEntry, data: TensorData) -> list[float]:
    if math.prod(entry.shape) > 8 or entry.dtype not in ("I32", "I64", "U8", "F32"):
        raise LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; one or two "
            "numbers were expected. The file is damaged",
        )
    return [float(value) for value in data.tensor(entry.name).flatten().tolist()]


def _group_words(size: object) -> str:
    return "per channel" if size is None else f"group {printable(size)}"


def _rules(values: dict[str, object], place: str) -> dict[str, dict[str, object]]:
    """Tag -> weight_quant_params; "" for those of all layers."""
    found = values.get("quant_config")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise LowbitError("E0212", f"{place}.quant_config must be an object, found {type(found).__name__}")
    tags = {"": found} if "weight_quant_params" in found else found
    rules: dict[str, dict[str, object]] = {}
    for tag, told in tags.items():
        if told is None:
            continue
        inner = told.get("weight_quant_params") if isinstance(told, dict) else None
        if not isinstance(inner, dict):
            raise LowbitError(
                "E0212", f"{place}.quant_config: {printable(repr(tag))} has no weight_quant_params"
            )
        bits = inner.get("nbits")
        if bits is not None and (isinstance(bits, bool) or bits not in (*BITS, 1.58)):
            raise LowbitError(
                "E0212",
                f"{place}: nbits must be one of {', '.join(map(str, BITS))}, found {printable(repr(bits))}",
            )
        rules[tag] = inner
    return rules


FORMAT = Hqq
