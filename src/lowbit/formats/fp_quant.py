"""FP-Quant checkpoints (Egiazarian et al., 2025) as transformers saves them: MXFP4 or NVFP4 under a block
Hadamard transform of weights and inputs.

    qweight                   U8 [out, in / 2]             e2m1 codes, an even column in the low four bits
    scales                    U8 [out, in / g] or padded   g = 32: mxfp4, 2^(byte - 127); g = 16: nvfp4, e4m3
    dqweight                  float [out, in]              instead of both, with ``pseudoquantization``
    weight_global_scale, act_global_scale                  one float each
    forward_hadamard_matrix   float [n, n]                 n = ``hadamard_group_size``
    backward_hadamard_matrix                               for training only

    y = Q(x R) (code * scale / weight_global_scale)^T      R's blocks are forward_hadamard_matrix

The weights are stored rotated. Q has groups as the weights do, and ``s`` = act_global_scale: "abs_max" scales
by 2^floor(log2 |x|max) / s (mxfp4) or e4m3(s |x|max / 6) / s (nvfp4), "quest" by the power of two up to 0.487
standard deviations of the group. ``scales`` has rows in 128s and columns in 4s where QuTLASS made it; what is
behind the weight's own is not read. It is not swizzled: the package does that before each product.

Checkpoints that keep master weights (``store_master_weights``) are the unquantized model and refused. The
package's pseudo-quantized layers add a bias twice; here it is added once, as its real ones do. Empty tensors
that transformers leaves where there is nothing are passed over. Of a tie between two codes the package's
pseudo-quantization takes the smaller, its GPU kernels the even one, as here.

Inputs and logits are verified against the package's own kernels in Triton's interpreter (``dqweight``),
packed weights against the reference of QuTLASS' tests: what its GPU kernels wrote has not been seen.
"""

from __future__ import annotations

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
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, says_method
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme, RotationScheme, Scheme

_FLOATS = ("F32", "F16", "BF16")
_WHAT = "an FP-Quant layer"
_QUEST = 2.92247856 / 6.0  # standard deviations that 6, the largest code, stands for
_GROUPS = {"mxfp4": 32, "nvfp4": 16}
_SIZES = {"mxfp4": (32, 64, 128), "nvfp4": (16, 32, 64, 128)}
_OWN = (
    *("qweight", "scales", "dqweight", "weight", "weight_global_scale", "act_global_scale"),
    *("forward_hadamard_matrix", "backward_hadamard_matrix"),
)


class FpQuant(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "fp_quant"
    reference: ClassVar[str] = "fp-quant"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.kind, self.method, self.size = self._checked(found.values)
        if found.values.get("store_master_weights"):
            raise self._masters()
        require_tensors(header, (".qweight", ".dqweight"), self.place, self.name)
        self._rotations: dict[bytes, Rotation | None] = {}

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """The quant_method of the config."""
        return says_method(header, cls.name, "fp-quant")

    def describe(self) -> str:
        """Numbers, method and the transform's size."""
        where = self.place.split(":")[0]
        return f"fp_quant, {self.kind} by {self.method}, hadamard {self.size} in {where}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the config and the shapes of the module's tensors."""
        self._check(module)
        packed = self._has(module, "qweight")
        activation = ActivationScheme(
            number_format("e2m1"),
            (1, _GROUPS[self.kind]),
            scale=number_format("e8m0" if self.kind == "mxfp4" else "e4m3"),
            spread=_QUEST if self.method == "quest" else 0.0,
        )
        rotation = RotationScheme("hadamard", self.size)
        if not packed:
            number = DENSE_DTYPES[self.header.tensors[module.tensor("dqweight")].dtype]
            return Scheme(number_format(number), activation=activation, rotation=rotation)
        return Scheme(
            number_format("e2m1"),
            ((1, _GROUPS[self.kind]), (0, 0)),
            (activation.scale, number_format("f32")),
            activation=activation,
            rotation=rotation,
        )

    def _tensors(self, module: StoredModule) -> list[str]:
        """Everything stored for the module, what is for training included."""
        names = (module.tensor(suffix) for suffix in _OWN)
        return [name for name in names if name in self.header.tensors]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The rotated weight."""
        scheme = self.scheme_of(module)
        if scheme.is_dense:
            name = module.tensor("dqweight")
            values = finite_scales(self.header, name, data.tensor(name))
            origin = origin_of(self.header, module, "dqweight")
            return QuantizedTensor(scheme, module.shape, values, origin=origin)
        codes = unpack_bits(data.tensor(module.tensor("qweight")), 4, module.shape[1])
        kind = torch.float8_e8m0fnu if self.kind == "mxfp4" else torch.float8_e4m3fn
        columns = module.shape[1] // _GROUPS[self.kind]
        stored = data.tensor(module.tensor("scales"))[: module.shape[0], :columns].contiguous().view(kind)
        scales = finite_scales(self.header, module.tensor("scales"), stored)
        outer = 1.0 / self._number(module, "weight_global_scale", data)
        origin = origin_of(self.header, module, "qweight")
        return QuantizedTensor(scheme, module.shape, codes, (scales, outer.reshape(1, 1)), origin=origin)

    def _input(self, module: StoredModule, data: TensorData) -> InputRule:
        """What rotates and quantizes its input."""
        number = self._number(module, "act_global_scale", data)
        # The scheme's power of two is a quarter of |x|'s own: 6, the largest code, is 1.5 times 4.
        quarters = 4.0 if self.kind == "mxfp4" and self.method == "abs_max" else 1.0
        outer = quarters / number
        plain = self.kind == "mxfp4" and bool(outer == 1)
        name = module.tensor("forward_hadamard_matrix")
        matrix = finite_scales(self.header, name, data.tensor(name)).float()
        key = matrix.numpy().tobytes()
        if key not in self._rotations:
            identity = torch.equal(matrix, torch.eye(self.size))
            self._rotations[key] = None if identity else Rotation.of(matrix)
        return InputRule(static_scale=None if plain else outer, rotation=self._rotations[key])

    def _number(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """float32 scalar, above zero."""
        name = module.tensor(suffix)
        value = finite_scales(self.header, name, data.tensor(name)).float().reshape(())
        if float(value) <= 0:
            raise LowbitError(
                "E0215",
                f"{self.header.file_of(name)}: tensor {name!r} is {float(value):g}, no scale to divide by",
            )
        return value

    def _check(self, module: StoredModule) -> None:
        """That every tensor is there in the size the config says."""
        out, columns = module.shape
        if columns % self.size:
            raise LowbitError(
                "E0212",
                f"{self.place}.hadamard_group_size is {self.size}, which does not divide the {columns} "
                f"inputs of {module.name}",
            )
        matrix = entry_of(self.header, module, "forward_hadamard_matrix", _FLOATS, _WHAT)
        check_shape(matrix, (self.size, self.size), _WHAT)
        for suffix in ("weight_global_scale", "act_global_scale"):
            check_shape(entry_of(self.header, module, suffix, _FLOATS, _WHAT), (1,), _WHAT)
        if not self._has(module, "qweight"):
            if not self._has(module, "dqweight"):
                raise self._masters()
            check_shape(entry_of(self.header, module, "dqweight", _FLOATS, _WHAT), module.shape, _WHAT)
            return
        check_shape(entry_of(self.header, module, "qweight", ("U8",), _WHAT), (out, columns // 2), _WHAT)
        scales = entry_of(self.header, module, "scales", ("U8", "F8_E8M0", "F8_E4M3"), _WHAT)
        exact = (out, columns // _GROUPS[self.kind])
        padded = (-(-exact[0] // 128) * 128, -(-exact[1] // 4) * 4)
        if scales.shape == exact or (scales.shape == padded and exact[1] % 4 == 0):
            return
        if scales.shape == padded:
            raise LowbitError(
                "E0218",
                f"{scales.file.name}: tensor {scales.name!r} is {list(padded)} for {list(exact)} scales: how "
                "rows of a number that 4 does not divide lie in it is not known",
            )
        check_shape(scales, padded, _WHAT)

    def _is_dense(self, module: StoredModule) -> bool:
        """Whether the layer was left as it is."""
        return not self._has(module, "qweight") and not (
            self._has(module, "dqweight") or self._has(module, "forward_hadamard_matrix")
        )

    def _has(self, module: StoredModule, suffix: str) -> bool:
        entry: TensorEntry | None = self.header.tensors.get(module.tensor(suffix))
        return entry is not None and 0 not in entry.shape

    def _masters(self) -> LowbitError:
        return LowbitError(
            "E0218",
            f"{self.place}: the checkpoint keeps master weights (store_master_weights), which are quantized "
            "when the tool computes; save it without them, or remove quantization_config to serve "
            "the weights as they are",
        )

    def _checked(self, values: dict[str, object]) -> tuple[str, str, int]:
        """(mxfp4 or nvfp4, abs_max or quest, the transform's size); E0212 where the tool would refuse."""
        kind, method = values.get("forward_dtype"), values.get("forward_method")
        methods = {"mxfp4": ("abs_max", "quest"), "nvfp4": ("abs_max",)}
        if not isinstance(kind, str) or kind not in methods:
            raise self._wrong("forward_dtype", kind, ", ".join(methods))
        if method not in methods[kind]:
            raise self._wrong("forward_method", method, f"{', '.join(methods[kind])} beside {kind}")
        size = values.get("hadamard_group_size")
        size = _GROUPS[kind] if size is None else size
        if isinstance(size, bool) or not isinstance(size, int) or size not in _SIZES[kind]:
            raise self._wrong("hadamard_group_size", size, ", ".join(map(str, _SIZES[kind])))
        return kind, str(method), size

    def _wrong(self, key: str, value: object, expected: str) -> LowbitError:
        return LowbitError(
            "E0212", f"{self.place}.{key} is {printable(repr(value), 40)}; expected one of {expected}"
        )


FORMAT = FpQuant
