"""AMD Quark checkpoints (``quant_method: quark``): fp8, int8, int4, OCP's MX formats, NVFP4.

What a module is follows from the first that speaks: ``exclude``, a pattern of ``layer_quant_config``,
``layer_type_quant_config`` of Linears, ``global_quant_config``. Each has a spec of ``weight`` and of
``input_tensors``: dtype, qscheme, group_size, symmetric, is_dynamic, scale_format.

    dtype               weight                            weight_scale                 weight_zero_point
    fp8_e4m3, fp8_e5m2  F8_E4M3, F8_E5M2 [out, in]        [] or [out]
    int8, uint8         I8, U8 [out, in]                  [] or [out]                  like the scales
      per_group         [in, out]                         [in / g, out]                like the scales
    int4, uint4         I32 [out, in / 8]                 [] or [out]                  I32 [] or [out / 8]
      per_group         I32 [in, out / 8]                 [in / g, out]                I32 [in / g, out / 8]
    fp4                 U8 [out, in / 2]                  U8 (e8m0) or float [out, in / g]
      two stages        the same                          F8_E4M3 [out, in / 16], and weight_scale_2 []
    integers of fp8     as the integers'                  [], and weight_scale_2,      weight_zero_point_2,
                                                          like the integers'           like theirs
    fp6_e2m3, fp6_e3m2  U8 [out, in * 3 / 4]              the same as fp4's first

Eight 4-bit codes lie in a word in the order 0 2 4 6 1 3 5 7 where ``export.pack_method`` says "reorder",
else in their own. fp4 has the even column in the low nibble, fp6 is a little-endian bit stream. weight =
(code - zero) * weight_scale (* weight_scale_2); signed codes are two's complement. Of integers of fp8 both
scales are multiplied first, which may cost the last bit of float32.

Inputs are quantized with ``input_scale`` (and ``input_zero_point``) where they are static; a scale a token
where they are dynamic, per token or per tensor; a power of two for 32 columns in MX formats, rounded as
``scale_calculation_mode`` says; under ``input_scale_2`` in NVFP4. ``output_tensors`` are read for the KV
cache. Those of Q and ``softmax_quant_spec`` are for attention in FP8, which is left in floats, with a warning
(so does Quark with the softmax, but in transformers' eager attention). Quark's "custom" configs call
themselves awq (tensors ``qweight``, ``scales``, ``qzeros``) or fp8, and have ``export``. Rotated inputs (R4,
online R1) have their matrix beside the weight, plain ones too: ``input_rotation`` I8 [n, n] of 1 and -1, over
the root of n, or floats as they are; or one for all of a size, ``shared_input_rotation_<n>``. x is multiplied
by ``input_prescale`` [in] before, where that is there, and then, n columns at a time, by the matrix. Refused
by name: the dtypes mx, mx6, mx9, bfp16, int2, uint2, int3 and e5m3 scales, float zero points, quantized
biases and other outputs, a rotated K cache.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import (
    InputRule,
    Notes,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import DENSE_DTYPES, dense_scheme, is_dense, origin_of, read_dense
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, quantization_config
from lowbit.formats.quark_scheme import FLOATS, INTEGERS, MANTISSA, QuarkConfig, Rule, Spec
from lowbit.numerics.bit_packing import unpack_bits, unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme, RotationScheme, Scheme

_EXTRA = (
    "weight_zero_point",
    "weight_scale_2",
    "weight_zero_point_2",
    "input_scale",
    "input_zero_point",
    "input_scale_2",
)
_SHARED = "shared_input_rotation_"
_log = logging.getLogger("lowbit")
_WHAT = "Quark"


class Quark(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "quark"
    reference: ClassVar[str] = "amd-quark"
    unused: ClassVar[tuple[str, ...]] = (r".*\.(q|k|v)_proj\.output_zero_point",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.config = QuarkConfig(found.place, found.values, found.method.lower())
        self.place, self.suffixes = found.place, self.config.suffixes
        if self.config.fp8_attention:
            _log.warning(
                "lowbit: %s: queries and softmax weights were quantized, too; attention computes with floats "
                "here, which is nearer to the original model",
                self.place,
            )
        # One object for each matrix, so that Q, K and V share what is done to x.
        self._rotations: dict[bytes, Rotation] = {}
        self._shared = {
            name.rpartition("_")[2]: name for name in header.tensors if f".{_SHARED}" in f".{name}"
        }
        own = any(name.endswith(".input_rotation") for name in header.tensors)
        if self.config.rotates and not (own or self._shared):
            raise LowbitError(
                "E0209",
                f"{header.root.name}: {self.place}.algo_config rotates inputs at run time but no file "
                "contains a matrix ('input_rotation'); export it again with a Quark that writes them",
            )
        if not self.config.fake:
            scales = self.suffixes.get("weight_scale", "weight_scale")
            require_tensors(header, (f".{scales}",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method quark, or awq or fp8 with Quark's ``export``."""
        if header.container != "safetensors":
            return None
        found = quantization_config(header)
        if found is None:
            return None
        dressed = found.method.lower() in ("awq", "fp8") and "export" in found.values
        if found.method.lower() != "quark" and not dressed:
            return None
        return f"{found.place} says {found.method}"

    def describe(self) -> str:
        """The dtypes of weights."""
        told = sorted({rule.weight.dtype for rule in self.config.rules if rule.weight is not None})
        return f"quark, {' and '.join(told) or 'nothing'} in {self.place.split(':')[0]}"

    def _is_dense(self, module: StoredModule) -> bool:
        return is_dense(self.header, module) and self._matrix(module) is None

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the config; dtypes and shapes must agree."""
        matrix = self._matrix(module)
        scheme = self._stored(module)[0] if not is_dense(self.header, module) else None
        if matrix is None:
            assert scheme is not None, "a plain weight has no reader but with a rotation"
            return scheme
        kind = "hadamard" if matrix.dtype == "I8" else "orthogonal"
        rotation = RotationScheme(kind, matrix.shape[0])
        return replace(scheme or dense_scheme(self.header, module), rotation=rotation)

    def _tensors(self, module: StoredModule) -> list[str]:
        plain = is_dense(self.header, module)
        return [module.tensor("weight") if plain else self._tensor(module, "weight")]

    def _beside(self, module: StoredModule) -> list[str]:
        """Scales and zero points of the weight and of its inputs, and what rotates these."""
        names = [self._tensor(module, suffix) for suffix in (*_EXTRA, "weight_scale")]
        if (matrix := self._matrix(module)) is not None:
            names += [matrix.name, module.tensor("input_prescale")]
        return [name for name in names if name in self.header.tensors]

    def _matrix(self, module: StoredModule) -> TensorEntry | None:
        """The matrix that rotates the module's inputs; None where they stay as they are."""
        columns = module.shape[1]
        name = module.tensor("input_rotation")
        entry = self.header.tensors.get(name)
        if entry is None and self.config.rotates_inputs(module):
            sizes = [size for size in self._shared if size.isdecimal() and not columns % (int(size) or 1)]
            if not sizes:
                raise LowbitError(
                    "E0209", f"{self.header.root.name}: no file contains {name!r}, which rotates its inputs"
                )
            # Where several divide the inputs, a matrix for all of them is the one that was meant.
            name = self._shared[max(sizes, key=int)]
            entry = self.header.tensors[name]
        if entry is None:
            return None
        size = entry.shape[0] if entry.shape else 0
        square = entry.shape == (size, size) and size > 0
        if entry.dtype not in ("I8", "F64", *DENSE_DTYPES) or not square or columns % size:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; a rotation of "
                f"{columns} inputs is I8 or floats [n, n] with an n that divides them",
            )
        return entry

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked and upright, scales as stored."""
        if is_dense(self.header, module):
            self._check_plain(module)
            plain = read_dense(self.header, module, data).weight
            return replace(plain, scheme=self._scheme(module))
        scheme, rule = self._scheme(module), self._stored(module)[1]
        spec, (out, columns) = rule.weight, module.shape
        assert spec is not None, "_stored looked"
        name = self._tensor(module, "weight")
        stored = data.tensor(name)
        turned = spec.qscheme == "per_group" and spec.dtype in INTEGERS
        scales = [self._scale(module, scheme, turned, _inner(rule), data)]
        if (outer := _outer(rule)) is not None:
            scales.append(self._one(module, outer, data).reshape(1, 1))
        zeros = None
        if spec.dtype in INTEGERS:
            codes = self._integers(stored, spec, columns if not turned else out)
            codes = codes.T.contiguous() if turned else codes
            zeros = self._zeros(module, scheme, rule, turned, data)
        elif spec.dtype.startswith("fp8"):
            codes = finite_scales(self.header, name, stored).view(torch.uint8)
        else:
            codes = unpack_bits(stored, int(scheme.weight.bits), columns)
        return QuantizedTensor(
            scheme,
            module.shape,
            codes,
            tuple(scales),
            zeros,
            origin=origin_of(self.header, module, self.suffixes.get("weight", "weight")),
        )

    def _check_plain(self, module: StoredModule) -> None:
        """A plain weight stands for itself, whatever the config says."""
        rule = self.config.rule_of(module)
        if rule.weight is None or module.stored.rpartition(".")[2] == "embed_tokens":
            return
        scale = self._tensor(module, "weight_scale")
        if self.config.fake or scale in self.header.tensors:
            self.notes.contradiction(
                "E0214",
                f"{self.header.file_of(module.tensor('weight'))}: {module.stored!r} is stored as plain "
                f"floats, {self.place} says {rule.weight.dtype}; reading them as they are, and inputs are "
                "not quantized",
            )

    # ---- how it lies

    def _tensor(self, module: StoredModule, suffix: str) -> str:
        """The stored name of one of a module's tensors."""
        return module.tensor(self.suffixes.get(suffix, suffix))

    def _entry(self, module: StoredModule, suffix: str, dtypes: tuple[str, ...], what: str) -> TensorEntry:
        """A tensor the module must have, of one of ``dtypes``."""
        return entry_of(self.header, module, self.suffixes.get(suffix, suffix), dtypes, what)

    def _stored(self, module: StoredModule) -> tuple[Scheme, Rule]:
        """The scheme and the rule, after dtypes and shapes were checked."""
        name = self._tensor(module, "weight")
        entry = self._entry(module, "weight", ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", *DENSE_DTYPES), _WHAT)
        if module.expert is not None:
            raise LowbitError(
                "E0218",
                f"{entry.file.name}: {module.stored!r} is a stack of experts, which is not read from Quark "
                "checkpoints; use a version with a module for each expert",
            )
        rules = self.config.rules_of(module)
        fitting: dict[str, tuple[Scheme, Rule]] = {}
        refusal: LowbitError | None = None
        for pattern, rule in rules.items():
            if rule.weight is None:
                refusal = refusal or LowbitError(
                    "E0213",
                    f"{entry.file.name}: tensor {name!r} is {entry.dtype}, but {self.place} does not say how "
                    f"{module.stored!r} is quantized; correct the quantization config",
                )
                continue
            try:
                scheme = self._scheme_by(module, rule, rule.weight, entry)
            except LowbitError as error:
                refusal = refusal or error
                continue
            static = scheme.activation is not None and scheme.activation.mode == "static"
            if len(rules) == 1 or static == (self._tensor(module, "input_scale") in self.header.tensors):
                fitting[pattern] = scheme, rule
        if not fitting:
            raise refusal or LowbitError("E0213", self._unfit(module, entry, rules))
        if len(fitting) > 1:
            first, second = list(fitting)[:2]
            self.notes.contradiction(
                "E0214",
                f"{entry.file.name}: {module.stored!r} has two rules in {self.place}, "
                f"{printable(repr(first))} and {printable(repr(second))}, and the tensors fit both; reading "
                "it by the first",
            )
        return next(iter(fitting.values()))

    def _unfit(self, module: StoredModule, entry: TensorEntry, rules: Iterable[str]) -> str:
        said = " and ".join(printable(repr(pattern)) for pattern in rules)
        return (
            f"{entry.file.name}: {module.stored!r} has the rules {said} in {self.place}, and its "
            "input_scale, there or not, fits none; correct the quantization config"
        )

    def _scheme_by(self, module: StoredModule, rule: Rule, spec: Spec, entry: TensorEntry) -> Scheme:
        """The scheme of one rule; E0213 where dtypes or shapes are not what it stores."""
        dtype, shape = self._packed(module, spec)
        what = f"{_WHAT} with {spec.dtype} {spec.qscheme}"
        self._entry(module, "weight", (dtype,), what)
        check_shape(entry, shape, what)
        block, grid = self._grid(module, spec, entry)
        scale = self._scale_entry(module, rule, what)
        if math.prod(scale.shape) != 1 or math.prod(grid) != 1:
            check_shape(scale, grid, what)
        symmetric = self._check_zeros(module, rule, grid, what)
        kind = "e8m0" if spec.e8m0 else {"F8_E4M3": "e4m3", **DENSE_DTYPES}[scale.dtype]
        code = spec.code
        if spec.dtype in INTEGERS and not symmetric:
            code = f"uint{INTEGERS[spec.dtype][1]}"
        blocks, scales = [block], [number_format(kind)]
        if (outer := _outer(rule)) is not None:
            self._entry(module, outer, tuple(DENSE_DTYPES), what)
            blocks.append((0, 0))
            scales.append(number_format("f32"))
        return Scheme(
            number_format(code),
            tuple(blocks),
            tuple(scales),
            "none" if symmetric else "integer",
            activation=self._activation(module, rule),
        )

    def _packed(self, module: StoredModule, spec: Spec) -> tuple[str, tuple[int, int]]:
        """(dtype, shape) of the stored codes."""
        out, columns = module.shape
        if spec.dtype in FLOATS:
            dtype, code = FLOATS[spec.dtype]
            bits = int(number_format(code).bits)
            return dtype, (out, columns * bits // 8)
        dtype, bits, _ = INTEGERS[spec.dtype]
        count = 8 if bits == 4 else 1
        if spec.qscheme == "per_group":
            return dtype, (columns, -(-out // count))
        return dtype, (out, -(-columns // count))

    def _grid(
        self, module: StoredModule, spec: Spec, entry: TensorEntry
    ) -> tuple[tuple[int, int], tuple[int, ...]]:
        """(the block of a scale, the shape the scales are stored in)."""
        out, columns = module.shape
        if spec.qscheme == "per_tensor":
            return (0, 0), ()
        if spec.qscheme == "per_channel":
            if spec.axis != 0:
                raise LowbitError(
                    "E0218",
                    f"{entry.file.name}: {module.stored!r} has a scale for each column (ch_axis "
                    f"{spec.axis}), which is not supported; use a Quark scheme with a scale for each row "
                    "or group",
                )
            return (1, 0), (out,)
        rows, size = (1, spec.group) if spec.qscheme == "per_group" else spec.block
        if columns % size or out % rows or (spec.qscheme == "per_group" and spec.axis not in (1, -1)):
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: {module.stored!r} of {out} x {columns} is {spec.qscheme} along axis "
                f"{spec.axis} in blocks of {rows} x {size}, which do not divide it; config and weights are "
                "from different models",
            )
        grid = (out // rows, columns // size)
        turned = spec.qscheme == "per_group" and spec.dtype in INTEGERS
        return (rows, 0 if turned and size == columns else size), grid[::-1] if turned else grid

    def _scale_entry(self, module: StoredModule, rule: Rule, what: str) -> TensorEntry:
        spec = rule.weight
        assert spec is not None, "_stored looked"
        dtypes = (
            ("F8_E4M3",) if rule.weight_outer else ("U8", "F8_E8M0") if spec.e8m0 else tuple(DENSE_DTYPES)
        )
        return self._entry(module, _inner(rule), dtypes, what)

    def _check_zeros(self, module: StoredModule, rule: Rule, grid: tuple[int, ...], what: str) -> bool:
        """Whether there are no zero points to mind; those that are there have the right shape."""
        spec = rule.weight
        assert spec is not None, "the caller looked"
        name = self._tensor(module, _zero(rule))
        if name not in self.header.tensors:
            if spec.dtype in INTEGERS and not (spec.symmetric and INTEGERS[spec.dtype][2]):
                raise LowbitError(
                    "E0209", f"{self.header.root.name}: no file contains {name!r}, the zero points of {what}"
                )
            return True
        if spec.dtype not in INTEGERS:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} lies beside {spec.dtype} codes, which have "
                "no zero points; the packing does not match the quantization config",
            )
        dtype, bits, signed = INTEGERS[spec.dtype]
        entry = self._entry(module, _zero(rule), (dtype, "I32"), what)
        shape = (*grid[:-1], -(-grid[-1] // 8)) if bits == 4 and grid else grid
        if math.prod(entry.shape) != 1 or math.prod(shape) != 1:
            check_shape(entry, shape, what)
        return spec.symmetric and signed

    # ---- numbers

    def _integers(self, stored: Tensor, spec: Spec, count: int) -> Tensor:
        """uint8 codes, signed ones in offset binary."""
        _, bits, signed = INTEGERS[spec.dtype]
        if bits == 4:
            return unpack_words(stored, 4, count, order=self.config.order) ^ (8 * signed)
        return stored.view(torch.uint8) ^ (0x80 * signed)

    def _scale(
        self, module: StoredModule, scheme: Scheme, turned: bool, suffix: str, data: TensorData
    ) -> Tensor:
        """The inner scales as (rows of blocks, columns of blocks)."""
        name = self._tensor(module, suffix)
        stored = data.tensor(name)
        if scheme.scales[0].name == "e8m0":
            stored = stored.view(torch.float8_e8m0fnu)
        stored = stored.T.contiguous() if turned else stored
        return finite_scales(self.header, name, stored.reshape(_blocks(scheme, module.shape)))

    def _zeros(
        self, module: StoredModule, scheme: Scheme, rule: Rule, turned: bool, data: TensorData
    ) -> Tensor | None:
        """uint8 zero points as (rows of blocks, columns of blocks), of signed codes plus half their range.

        None where they are all 0, as they must be beside symmetric codes.
        """
        spec, name = rule.weight, self._tensor(module, _zero(rule))
        entry = self.header.tensors.get(name)
        if entry is None:
            return None
        assert spec is not None, "the caller looked"
        _, bits, signed = INTEGERS[spec.dtype]
        stored, (rows, columns) = data.tensor(name), _blocks(scheme, module.shape)
        if bits == 4 and entry.shape:
            stored = unpack_words(
                stored, 4, rows if turned or columns == 1 else columns, order=self.config.order
            )
            stored = stored.to(torch.int32)
            stored = (stored ^ 8) - 8 if signed else stored
        wide = stored.to(torch.int32) + (1 << bits - 1) * signed
        if int(wide.min()) < 0 or int(wide.max()) >> bits:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} holds {int(stored.min())} to {int(stored.max())}, "
                f"more than {spec.dtype} has; the file is damaged",
            )
        zeros = (wide.T if turned else wide).reshape(rows, columns).to(torch.uint8)
        if scheme.zero == "integer":
            return zeros
        if bool((zeros != 1 << bits - 1).any()):
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} has zero points other than 0, {self.place} says that "
                f"{module.stored!r} is symmetric; correct the config",
            )
        return None

    def _one(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """float32 []: a scale of a whole tensor."""
        entry = self._entry(module, suffix, tuple(DENSE_DTYPES), _WHAT)
        if math.prod(entry.shape) != 1:
            check_shape(entry, (), f"{_WHAT}, per tensor,")
        return finite_scales(self.header, entry.name, data.tensor(entry.name)).float().reshape(())

    # ---- inputs

    def _activation(self, module: StoredModule, rule: Rule) -> ActivationScheme | None:
        spec = rule.inputs
        if spec is None:
            return None
        where = f"{self.place}: input_tensors of {module.stored!r}"
        if rule.inputs_outer:
            if (spec.group, spec.dynamic) != (16, True):
                raise LowbitError(
                    "E0218", f"{where}: only groups of 16, dynamic, are supported beside e4m3 scales"
                )
            return ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3"))
        integer = spec.dtype in INTEGERS
        code = "int8" if spec.dtype == "uint8" else spec.code
        fmt, symmetric = number_format(code), spec.symmetric and spec.dtype not in ("uint8", "uint4")
        grouped = spec.qscheme == "per_group" and spec.dynamic and symmetric and spec.axis in (1, -1)
        if integer and grouped:  # the largest |x| is half of the range
            limit = 2.0 ** (fmt.bits - 1) - 0.5
            return ActivationScheme(fmt, (1, spec.group), limit=limit, reciprocal=True)
        if spec.dtype in ("int4", "uint4", "fp8_e5m2") or (integer and spec.qscheme == "per_group"):
            raise LowbitError(
                "E0218",
                f"{where}: {spec.dtype} {spec.qscheme} is not supported; use fp8_e4m3, int8 or an MX format",
            )
        if spec.qscheme == "per_tensor" and not spec.dynamic:
            return ActivationScheme(fmt, (0, 0), "static", symmetric)
        if spec.qscheme == "per_group" and spec.dynamic and spec.e8m0:
            return ActivationScheme(
                fmt, (1, spec.group), scale=number_format("e8m0"), round_up=_round_up(spec.mode, code)
            )
        token = spec.qscheme == "per_tensor" or (spec.qscheme == "per_channel" and spec.axis == 1)
        if spec.dynamic and token:
            if code == "int8" and symmetric:  # the largest |x| is half of the range: -127.5 is a tie
                return ActivationScheme(fmt, (1, 0), limit=127.5, reciprocal=True)
            return ActivationScheme(fmt, (1, 0), symmetric=symmetric)
        raise LowbitError(
            "E0218",
            f"{where}: {spec.dtype} {spec.qscheme} along axis {spec.axis}, "
            f"{'dynamic' if spec.dynamic else 'static'}, "
            "is not supported; use per tensor, per token or an MX format",
        )

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """What rotates inputs, and what their scales are."""
        rule = None if is_dense(self.header, module) else self._quantized_input(module, data)
        matrix = self._matrix(module)
        if matrix is None:
            return rule
        return replace(rule or InputRule(), rotation=self._rotation(module, matrix, data))

    def _rotation(self, module: StoredModule, matrix: TensorEntry, data: TensorData) -> Rotation:
        """x @ the matrix, of x times ``input_prescale`` where there is one."""
        stored = finite_scales(self.header, matrix.name, data.tensor(matrix.name))
        divisor = math.sqrt(len(stored)) if matrix.dtype == "I8" else 1.0
        name = module.tensor("input_prescale")
        entry = self.header.tensors.get(name)
        scale = None
        if entry is not None:
            self._entry(module, "input_prescale", tuple(DENSE_DTYPES), _WHAT)
            check_shape(entry, (module.shape[1],), _WHAT)
            scale = finite_scales(self.header, name, data.tensor(name)).float()
        parts = [stored] if scale is None else [stored, scale]
        key = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        if key not in self._rotations:
            rotation = Rotation.of(stored, divisor)
            if scale is not None and rotation.matrix is not None:
                raise LowbitError(
                    "E0218",
                    f"{matrix.file.name}: tensor {name!r} multiplies inputs before {matrix.name!r}, which is "
                    "no Hadamard matrix of a power of two; that is not supported; export without a prescale",
                )
            if scale is not None:
                repeats = len(scale) // rotation.size
                before = scale if rotation.before is None else scale * rotation.before.repeat(repeats)
                after = None if rotation.after is None else rotation.after.repeat(repeats)
                rotation = replace(rotation, before=before, after=after)
            self._rotations[key] = rotation
        return self._rotations[key]

    def _quantized_input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """The one scale of static inputs, or the outer one of NVFP4's."""
        scheme, rule = self._stored(module)
        activation = scheme.activation
        if activation is None or rule.inputs is None:
            return None
        if rule.inputs_outer:
            return InputRule(static_scale=self._one(module, "input_scale_2", data))
        if activation.mode != "static":
            return None
        scale = self._one(module, "input_scale", data)
        if activation.symmetric or rule.inputs.dtype not in INTEGERS:
            return InputRule(static_scale=scale)
        name = module.tensor("input_zero_point")
        entry = self._entry(module, "input_zero_point", ("I8", "U8", "I32"), _WHAT)
        if math.prod(entry.shape) != 1:
            check_shape(entry, (), f"{_WHAT}, per tensor,")
        zero = data.tensor(name).reshape(()).float()
        zero = zero - 128.0 if rule.inputs.dtype == "uint8" else zero
        if not -128 <= float(zero) <= 127:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {name!r} is {int(zero)}, no zero point of 8 bits; the file is "
                f"damaged",
            )
        return InputRule(static_scale=scale, static_zero=zero)


def _inner(rule: Rule) -> str:
    """What the scales of a weight's codes are called: they are the second where the codes are of codes."""
    return "weight_scale_2" if rule.progressive else "weight_scale"


def _zero(rule: Rule) -> str:
    return "weight_zero_point_2" if rule.progressive else "weight_zero_point"


def _outer(rule: Rule) -> str | None:
    """What the scale of scales or of all codes is called; None where there is none."""
    if rule.progressive:
        return "weight_scale"
    return "weight_scale_2" if rule.weight_outer else None


def _round_up(mode: str | None, code: str) -> float:
    """From how many times a power of two on a largest |x| counts as the next one."""
    if mode == "floor":
        return 0.0
    if mode == "ceil":
        return 1.0 + 2.0**-23
    return 2.0 - 2.0 ** -(MANTISSA[code] + 1)  # even: what rounds up with as many digits as a code has


def _blocks(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """How many inner blocks a weight has each way."""
    rows, columns = (size or whole for size, whole in zip(scheme.blocks[0], shape, strict=True))
    return -(-shape[0] // rows), -(-shape[1] // columns)


FORMAT = Quark
