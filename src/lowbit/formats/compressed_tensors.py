"""compressed-tensors: what llm-compressor writes and Neural Magic, Red Hat and many others publish.

The config (``compressed_tensors_scheme``) says how each group of modules is quantized; the tensors say which
modules really are, and in which layout. Weights are (out, in), packed along *in*, each row by itself:

    layout            weight                              scales beside it
    pack-quantized    weight_packed  (out, P)      I32      weight_scale (out, groups) | (out, 1) | (1)
    int-quantized     weight         (out, in)     I8       the same; asymmetric: weight_zero_point like it
    float-quantized   weight         (out, in)     F8_E4M3  the same, or (row blocks, column blocks)
    nvfp4-pack        weight_packed  (out, in/2)   U8       (out, in/16) F8_E4M3 and weight_global_scale
    mxfp4-pack        weight_packed  (out, in/2)   U8       (out, in/32) U8: 2^(byte - 127)
    mxfp6-pack        weight_packed  (out, 3in/4)  U8       the same
    mxfp8             weight         (out, in)     F8_E4M3  the same
    marlin-24, sparse-bitmask, sparse-24-bitmask: ``compressed_tensors_sparse``

Packed integer codes have 2^(bits - 1) added, so a symmetric weight's bytes are those of our signed codes.
3-, 5-, 6- and 7-bit codes are a dense bit stream since version 0.17 and 32 // bits a word, top bits unused,
before; nothing but P tells which (``version`` where both give the same P). Asymmetric packed weights have
``weight_zero_point`` (Pz, groups), packed the same way along *out*. ``weight_g_idx`` (in,), written up to
0.19 with actorder "group", is the group of each column; the columns themselves lie in their own order.
NVFP4 weights are value * scale / weight_global_scale: that is the *reciprocal* of the outer scale.

What the data decide over the config: whether a module is quantized at all (a plain float ``weight`` is read
as it is, whatever ``quantization_status`` says), its layout, and nonzero zero points of a "symmetric" weight.

As in the tool, patterns are tried in alphabetical, not in config order; a ``quantization_status`` of "frozen"
with packed tensors is normal in files before 2025.
Rotations of activations at run time: ``compressed_tensors_transforms``. Refused: static scales for groups of
inputs, quantized outputs (but for k_proj and v_proj, where they are KV-cache scales), stacked experts stored
(in, out).
Exact against compressed-tensors 0.20.0, 0.16.0 and 0.12.2. The reverse of marlin-24, which no tool has, is
checked against what 0.12.2 packed. NVFP4: the tool divides the scales first, the last float32 bit may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, thousands
from lowbit.formats import InputRule, Notes, StoredLinear, StoredModule, check_shape
from lowbit.formats.compressed_tensors_layout import FLOATS, Layouts, Plan
from lowbit.formats.compressed_tensors_scheme import parse_config
from lowbit.formats.compressed_tensors_sparse import scatter_bitmask, unpack_marlin24, unpack_marlin24_scales
from lowbit.formats.compressed_tensors_transforms import METHODS, Transforms
from lowbit.formats.dense import (
    DENSE_DTYPES,
    bias_tensors,
    dense_scheme,
    of_expert,
    origin_of,
    read_bias,
    read_dense,
)
from lowbit.formats.quantization_config import quantization_config
from lowbit.numerics.bit_packing import unpack_bits, unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_SUFFIXES = (
    *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_g_idx", "scale_packed", "meta", "compressed", "bitmask", "shape", "row_offsets"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
_CHUNK = 1 << 22  # codes unpacked at a time; bit streams take a byte for each bit on the way


class CompressedTensors:
    """Checkpoints of llm-compressor and compressed-tensors."""

    name = "compressed-tensors"
    aliases = ("compressed_tensors", "sparseml")
    reference = "compressed-tensors"
    unused = ()

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        found = quantization_config(header)
        if found is None:
            raise LowbitError("E0212", f"{header.root.name}: config.json names no quantization")
        self.header = header
        self.notes = notes
        self.config = parse_config(found.values, found.place)
        self.layouts = Layouts(header, self.config, notes)
        self.transforms = Transforms.of(header)
        if header.config.get("tie_word_embeddings") and "lm_head.weight" not in header.tensors:
            self.transforms.refuse_tied()

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """The quant_method of the config."""
        if header.container == "gguf":
            return None
        found = quantization_config(header)
        if found is None or found.method not in METHODS:
            return None
        return f"{found.place} says quant_method {found.method}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """From the config's group and the dtypes and shapes of the module's tensors."""
        rotation, of_output = self.transforms.schemes(module)
        return replace(self._weight_scheme(module), rotation=rotation, output_rotation=of_output)

    def _weight_scheme(self, module: StoredModule) -> Scheme:
        plan = self.layouts.plan_of(module)
        if plan is not None:
            return plan.scheme
        if self.layouts.is_sparse(module):
            return dense(DENSE_DTYPES[self.layouts.sparse_entry(module).dtype])
        return dense_scheme(self.header, module)

    def tensors_of(self, module: StoredModule) -> list[str]:
        """Everything stored for the module."""
        plan = self.layouts.plan_of(module)
        unused = {"weight"} if plan is not None and plan.weight != "weight" else set()
        names = [module.tensor(suffix) for suffix in _SUFFIXES if suffix not in unused]
        found = [name for name in names if name in self.header.tensors] + bias_tensors(self.header, module)
        return found + self.transforms.tensors_of(module)

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """Codes unpacked to bytes, scales as stored; and what rotates input and output."""
        found = self._read(module, data)
        rotation, of_output = self.transforms.schemes(module)
        if rotation is None and of_output is None:
            return found
        scheme = replace(found.weight.scheme, rotation=rotation, output_rotation=of_output)
        rule = found.input
        if rotation is not None:
            rule = replace(rule or InputRule(), rotation=self.transforms.read(module, "input", data))
        output = self.transforms.read(module, "output", data)
        return StoredLinear(replace(found.weight, scheme=scheme), found.bias, rule, output)

    def _read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        plan = self.layouts.plan_of(module)
        if plan is None and not self.layouts.is_sparse(module):
            return read_dense(self.header, module, data)
        bias = read_bias(self.header, module, data)
        if plan is None:
            weight = self._sparse_values(module, data)
            origin = origin_of(self.header, module, "compressed")
            return StoredLinear(
                QuantizedTensor(self._weight_scheme(module), module.shape, weight, origin=origin), bias
            )
        self._check_told_shape(module, data)
        quantized = self._read_weight(module, plan, data)
        return StoredLinear(quantized, bias, self._input_rule(module, plan, data))

    def describe(self) -> str:
        """The groups' schemes."""
        groups = [str(group.weights) for group in self.config.quantizing()]
        more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
        schemes = "; ".join(groups[:3]) + more if groups else "not quantized"
        sparse = f", {self.config.sparsity}" if self.config.sparsity != "dense" else ""
        places = ", ".join(dict.fromkeys(step.location for step in self.transforms.steps))
        rotated = f", rotated at run time: {places}" if places else ""
        return f"compressed-tensors {self.config.format}{sparse} ({schemes}){rotated} in {self.config.place}"

    def _check_told_shape(self, module: StoredModule, data: TensorData) -> None:
        """``weight_shape`` and ``shape`` must be what the model expects."""
        for suffix in ("weight_shape", "shape"):
            name = module.tensor(suffix)
            entry = self.header.tensors.get(name)
            if entry is None:
                continue
            sizes = 1
            for size in entry.shape:
                sizes *= size
            if entry.dtype not in ("I64", "I32") or not 2 <= sizes <= 3 * max(module.experts, 1):
                check_shape(entry, (2,), "the shape of a weight")
            told = data.tensor(name).flatten()[-2:].tolist()
            if tuple(told) != module.shape:
                raise LowbitError(
                    "E0210",
                    f"{entry.file.name}: tensor {name!r} says {told} but the config asks for "
                    f"{list(module.shape)}; config and weights are from different models",
                )

    def _read_weight(self, module: StoredModule, plan: Plan, data: TensorData) -> QuantizedTensor:
        codes = self._codes(module, plan, data)
        scales = self._scales(module, plan, data)
        scheme, zeros = plan.scheme, self._zeros(module, plan, data)
        if zeros is not None and scheme.zero == "none":  # nonzero zero points of a "symmetric" weight
            scheme = replace(scheme, weight=number_format(f"uint{plan.args.bits}"), zero="integer")
        order = self._column_order(module, plan, data) if scheme.reordered else None
        if order is None:
            scheme = replace(scheme, reordered=False)
        else:
            codes = codes[:, order]
        origin = origin_of(self.header, module, plan.weight)
        return QuantizedTensor(scheme, module.shape, codes, scales, zeros, (), order, origin)

    def _codes(self, module: StoredModule, plan: Plan, data: TensorData) -> Tensor:
        """uint8 (out, in)."""
        shape, bits = module.shape, plan.args.bits
        if plan.weight == "compressed":
            stored = self._sparse_values(module, data)
        else:
            stored = of_expert(module, data.tensor(module.tensor(plan.weight)))
        if plan.layout == "packed":
            return _by_rows(
                stored, shape, lambda part: unpack_words(part, bits, shape[1], padded=plan.padded)
            )
        if plan.layout == "marlin":
            return unpack_marlin24(stored, data.tensor(module.tensor("meta")), bits, shape)
        if plan.layout in ("fp4", "fp6"):
            return _by_rows(stored, shape, lambda part: unpack_bits(part, bits, shape[1]))
        if plan.layout == "float":
            return stored.view(torch.uint8)
        codes = stored.view(torch.uint8) ^ 0x80  # -128 … 127 as 0 … 255
        return codes if bits == 8 else self._narrowed(module, plan, codes)

    def _narrowed(self, module: StoredModule, plan: Plan, codes: Tensor) -> Tensor:
        """Codes of fewer than 8 bits that are stored one an I8."""
        half = 1 << plan.args.bits - 1
        low, high = int(codes.min()), int(codes.max())
        if low < 128 - half or high >= 128 + half:
            entry = self.header.tensors[module.tensor(plan.weight)]
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {entry.name!r} holds codes from {low - 128} to {high - 128}; "
                f"{plan.args} has {-half} to {half - 1}. The codes do not match the quantization config",
            )
        return codes - (128 - half)

    def _sparse_values(self, module: StoredModule, data: TensorData) -> Tensor:
        mask = self.layouts.entry(module, "bitmask", ("U8",), "a sparse weight")
        check_shape(mask, (module.shape[0], -(-module.shape[1] // 8)), "a sparse weight")
        self._check_told_shape(module, data)
        values = data.tensor(module.tensor("compressed"))
        origin = origin_of(self.header, module, "compressed")
        return scatter_bitmask(values, data.tensor(mask.name), module.shape, origin)

    def _scales(self, module: StoredModule, plan: Plan, data: TensorData) -> tuple[Tensor, ...]:
        """One for each level, in the blocks' order, in the file's dtype."""
        rows, _ = plan.scheme.blocks[0]
        if plan.layout == "marlin":
            stored = self._finite(module, "scale_packed", data)
            inner = unpack_marlin24_scales(stored, plan.args.group, module.shape[1])
        else:
            inner = self._finite(module, "weight_scale", data)
            inner = inner.reshape(1, 1) if rows == 0 else inner.reshape(inner.shape[0], -1)
        if len(plan.scheme.blocks) == 1:
            return (inner,)
        outer = self._finite(module, "weight_global_scale", data, reciprocal=True)
        return inner, 1.0 / outer.float().reshape(1, 1)

    def _finite(
        self, module: StoredModule, suffix: str, data: TensorData, reciprocal: bool = False
    ) -> Tensor:
        """A scale tensor without NaN or infinity, nor zero where it is divided by; U8 as e8m0."""
        entry = self.header.tensors[module.tensor(suffix)]
        scale = of_expert(module, data.tensor(entry.name))
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        values = scale.float()
        wrong = ~values.isfinite() | (values == 0) if reciprocal else ~values.isfinite()
        if wrong.any():
            first = [int(place) for place in wrong.nonzero()[0]]
            kinds = "NaN, infinite or zero" if reciprocal else "NaN or infinite"
            raise LowbitError(
                "E0215",
                f"{entry.file.name}: tensor {entry.name!r} contains {thousands(int(wrong.sum()))} {kinds} of "
                f"{thousands(wrong.numel())} values (first at {first}); the file is damaged, download it "
                "again (lowbit check shows all)",
            )
        return scale

    def _zeros(self, module: StoredModule, plan: Plan, data: TensorData) -> Tensor | None:
        """uint8, like the scales, in units of the unsigned code; None where all stand for no zero point."""
        name, half = module.tensor("weight_zero_point"), 1 << plan.args.bits - 1
        entry = self.header.tensors.get(name)
        if entry is None:
            return None
        if plan.scheme.zero == "none" and (plan.args.kind == "float" or entry.dtype not in ("I8", "I32")):
            return None  # floats have none; old tools wrote a tensor of zeros
        entry = self.layouts.zero_entry(module, plan.args, plan.padded)
        stored = of_expert(module, data.tensor(name))
        if entry.dtype == "I32":
            zeros = unpack_words(stored, plan.args.bits, module.shape[0], dim=0, padded=plan.padded)
        else:
            zeros = (stored.view(torch.uint8) ^ 0x80) - (128 - half)
            if int(stored.min()) < -half or int(stored.max()) >= half:
                raise LowbitError(
                    "E0213",
                    f"{entry.file.name}: tensor {name!r} holds zero points from {int(stored.min())} to "
                    f"{int(stored.max())}; {plan.args} has {-half} to {half - 1}",
                )
        rows, _ = plan.scheme.blocks[0]
        zeros = zeros.reshape(1, 1) if rows == 0 else zeros.reshape(zeros.shape[0], -1)
        if plan.scheme.zero == "integer":
            return zeros
        if bool((zeros == half).all()):
            return None
        self.notes.contradiction(
            "E0214",
            f"{self.config.place} says symmetric, but {name!r} holds zero points other than 0; using them",
        )
        return zeros

    def _column_order(self, module: StoredModule, plan: Plan, data: TensorData) -> Tensor | None:
        """Column j of the result is the input's column ``order[j]``; None where groups lie in order."""
        what = f"compressed-tensors {plan.args}"
        entry = self.layouts.entry(module, "weight_g_idx", ("I32", "I64"), what)
        columns, size = module.shape[1], plan.args.group
        check_shape(entry, self.layouts.stacked(module, (columns,)), what)
        group_of_column = of_expert(module, data.tensor(entry.name)).long()
        if bool((group_of_column == -1).any()):  # the tool's mark for "never set"
            return None
        expected = torch.arange(columns) // (size or columns)
        if torch.equal(group_of_column, expected):
            return None
        order = group_of_column.argsort(stable=True)
        if not torch.equal(group_of_column[order], expected):
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {entry.name!r} does not put {size or columns} columns into "
                f"each of {int(expected[-1]) + 1} groups (it names groups {int(group_of_column.min())} to "
                f"{int(group_of_column.max())}); the file is damaged",
            )
        return order

    def _input_rule(self, module: StoredModule, plan: Plan, data: TensorData) -> InputRule | None:
        """The stored scales of a static activation scheme, and NVFP4's outer scale."""
        activation, inputs = plan.scheme.activation, plan.group.inputs
        if activation is None or inputs is None or inputs.dynamic is True:
            return None
        if inputs.dynamic == "local":
            return InputRule(static_scale=1.0 / self._input_number(module, "input_global_scale", data))
        scale = self._input_number(module, "input_scale", data)
        if inputs.symmetric:
            return InputRule(static_scale=scale)
        entry = self.layouts.entry(module, "input_zero_point", ("I8",), "an asymmetric static input")
        self.layouts.check_one(module, entry)
        zero = of_expert(module, data.tensor(entry.name)).reshape(())
        return InputRule(static_scale=scale, static_zero=zero)

    def _input_number(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """float32 scalar."""
        entry = self.layouts.entry(module, suffix, FLOATS, "a static input scale")
        self.layouts.check_one(module, entry)
        value = self._finite(module, suffix, data, reciprocal=suffix == "input_global_scale")
        return value.float().reshape(())


def _by_rows(stored: Tensor, shape: tuple[int, int], unpack: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 (out, in), unpacked a few rows at a time."""
    out, columns = shape
    codes = torch.empty(shape, dtype=torch.uint8)
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, out, step):
        codes[start : start + step] = unpack(stored[start : start + step])
    return codes


FORMAT = CompressedTensors
