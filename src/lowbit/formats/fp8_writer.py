"""FP8 as transformers (``fp8``), DeepSeek and Qwen have it, and SGLang's own 8-bit formats.

The layouts are those of ``fp8`` and ``w8a8``:

    fp8              weight F8_E4M3, weight_scale_inv: one a block, or [1, 1]; static inputs: activation_scale
    fbgemm_fp8       weight F8_E4M3, weight_scale [out, 1]: what ``fp8`` is called with scales a row
    w8a8_int8        weight I8,      weight_scale [out, 1]
    w8a8_fp8         weight F8_E4M3, weight_scale [out, 1]
    blockwise_int8   weight I8,      weight_scale_inv: one a block

All quantize their inputs, each in one way only; a checkpoint has one block size and static or dynamic inputs
throughout. fbgemm bounds the size of inputs by ``activation_scale_ub``; the largest float32 is no bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import NOT_IN_TRANSFORMERS, CheckpointWriter, cannot, with_limit
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_FLOATS = ("f32", "bf16", "f16")


class _OneWay(CheckpointWriter):
    """What these formats share: one level of scales, one way of quantizing inputs a checkpoint."""

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        self.block: tuple[int, int] | None = None
        first: dict[object, str] = {}
        for name, scheme in self.quantized().items():
            if scheme.blocks[0] not in ((0, 0), (1, 0)):
                self.block = self.block or scheme.blocks[0]
                if scheme.blocks[0] != self.block:
                    raise self._mixed(name, f"blocks of {scheme.blocks[0]}", f"{self.block}")
            kind = self._inputs(scheme)
            first.setdefault(kind, name)
            if len(first) > 1:
                other = next(iter(first))
                raise self._mixed(name, f"inputs {kind}", f"{other} in {first[other]}")

    def _inputs(self, scheme: Scheme) -> object:
        """What all modules of a checkpoint must share of their inputs."""
        return None

    def _mixed(self, name: str, here: str, there: str) -> LowbitError:
        return LowbitError(
            "E0450",
            f"--format {self.name}: {name} has {here}, other modules {there}; a checkpoint of this format "
            "has one. Choose another format (compressed-tensors mixes)",
        )


class Fp8Writer(_OneWay):
    """transformers' ``fp8``, and ``fbgemm_fp8`` where scales are a row's."""

    name = "fp8"
    writes = "blocks, per tensor (dynamic, static), per channel (fbgemm_fp8); ue8m0"

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, block, scale and inputs, in this order."""
        if scheme.is_dense:
            return None
        if scheme.weight.name != "e4m3" or len(scheme.blocks) != 1 or scheme.zero != "none":
            return f"weights are e4m3 with one level of scales, not {scheme}"
        rows, columns = scheme.blocks[0]
        channel = (rows, columns) == (1, 0)
        if scheme.blocks[0] != (0, 0) and not channel and (not rows or not columns):
            return f"scales are for blocks, rows or the whole tensor, not as in {scheme}"
        if scheme.scales[0].name not in (*_FLOATS, "e8m0") or scheme.reordered or scheme.offset:
            return f"it has no layout for {scheme}"
        activation = scheme.activation
        if activation is None:
            return "its inputs stay as they are, and this format quantizes them; use compressed-tensors"
        if channel:
            bounded = replace(_dynamic("e4m3", 0, 448.0), upper_bound=activation.upper_bound)
            return None if activation == bounded else f"inputs cannot be said to be {activation}"
        allowed = [ActivationScheme(number_format("e4m3"), (0, 0), "static")]
        for scale in ("f32", "e8m0"):
            if columns:
                allowed.append(_dynamic("e4m3", columns, 448.0, scale))
        if not columns:
            allowed.append(_dynamic("e4m3", 0, 448.0))
        return None if activation in allowed else f"inputs cannot be said to be {activation}"

    def warning(self) -> str:
        """Of scales of whole tensors, which others know under other names."""
        if self.block or self._rows is not None:
            return ""
        return (
            "vLLM and SGLang know scales of whole tensors as weight_scale and input_scale, and transformers' "
            "names of them in few families. For them: --format compressed-tensors"
        )

    def _inputs(self, scheme: Scheme) -> object:
        activation = scheme.activation
        if scheme.blocks[0] == (1, 0):
            return f"dynamic, beside scales a row, up to {activation.upper_bound if activation else 0:g}"
        return "static" if activation is not None and activation.mode == "static" else "dynamic"

    @property
    def _rows(self) -> Scheme | None:
        """The scheme of its modules where scales are a row's: then that of all."""
        return next((scheme for scheme in self.quantized().values() if scheme.blocks[0] == (1, 0)), None)

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        if self._rows is not None:
            return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": weight.scales[0]}
        single = weight.scheme.blocks[0] == (0, 0)
        if single and self.block and any(a > b for a, b in zip(module.shape, self.block, strict=True)):
            raise cannot(self.name, module, f"it has one scale, other modules blocks of {self.block}")
        if not single and weight.scales[0].numel() == 1 and module.shape[1] > weight.scheme.blocks[0][1]:
            raise cannot(self.name, module, "its only block is narrower than it is")
        found = {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale_inv": weight.scales[0]}
        activation = weight.scheme.activation
        if activation is not None and activation.mode == "static":
            if input is None or input.static_scale is None:
                raise cannot(self.name, module, "its static input scale is missing")
            found["activation_scale"] = input.static_scale.float().reshape(())
        return found

    def quantization_config(self) -> dict[str, object]:
        """transformers' FineGrainedFP8Config, or FbgemmFp8Config."""
        if self._rows is not None:
            activation = self._rows.activation
            bound = (activation.upper_bound if activation else 0.0) or torch.finfo(torch.float32).max
            return {
                "quant_method": "fbgemm_fp8",
                "activation_scale_ub": bound,
                "modules_to_not_convert": self.left_alone(),
            }
        schemes = list(self.quantized().values())
        static = any(self._inputs(scheme) == "static" for scheme in schemes)
        powers = any(scheme.activation and scheme.activation.scale.name == "e8m0" for scheme in schemes)
        return {
            "quant_method": "fp8",
            "activation_scheme": "static" if static else "dynamic",
            "weight_block_size": list(self.block) if self.block else None,
            "scale_fmt": "ue8m0" if powers else "float",
            "modules_to_not_convert": self.left_alone(),
        }


def _dynamic(code: str, columns: int, limit: float, scale: str = "f32") -> ActivationScheme:
    return ActivationScheme(number_format(code), (1, columns), limit=limit, scale=number_format(scale))


class W8a8Int8Writer(_OneWay):
    """SGLang's per-channel int8."""

    name = "w8a8_int8"
    writes = "int8 per channel"
    misread = (
        f"w8a8_int8 is SGLang's; {NOT_IN_TRANSFORMERS}. What transformers reads is compressed-tensors: "
        "--format compressed-tensors --requantize keeps the weights and rounds inputs by its rule, "
        "--quantization w8a8_int8:activation=none leaves inputs alone"
    )
    code: ClassVar[str] = "int8"
    limit: ClassVar[float] = 127.0
    scale_name: ClassVar[str] = "weight_scale"
    blocks: ClassVar[bool] = False

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, block, scale and inputs, in this order."""
        if scheme.is_dense:
            return None
        plain = len(scheme.blocks) == 1 and scheme.zero == "none" and not scheme.reordered
        if scheme.weight.name != cls.code or not plain or scheme.offset or scheme.flattened:
            return f"weights are {cls.code} with one level of scales, not {scheme}"
        rows, columns = scheme.blocks[0]
        if (not rows or not columns) if cls.blocks else (rows, columns) != (1, 0):
            return f"scales are one a {'block' if cls.blocks else 'row'}, not as in {scheme}"
        if scheme.scales[0].name not in _FLOATS:
            return f"scales are {', '.join(_FLOATS)}, not {scheme.scales[0].name}"
        wanted = _dynamic(cls.code, columns, cls.limit)
        if scheme.activation != wanted:
            return f"inputs are always {wanted} (limit {cls.limit:g}), here {scheme.activation}"
        return None

    @classmethod
    def nearest_inputs(cls, scheme: Scheme) -> Scheme | None:
        """int8 whose largest |x| becomes 127, where compressed-tensors and torchao have 127.5."""
        return with_limit(scheme, cls.limit)

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        if self.code == "int8":
            stored = (weight.codes ^ 0x80).view(torch.int8)  # offset binary to two's complement
        else:
            stored = weight.codes.view(torch.float8_e4m3fn)
        return {"weight": stored, self.scale_name: weight.scales[0]}

    def quantization_config(self) -> dict[str, object]:
        """The method, what was left alone, and the block where there is one."""
        block: dict[str, object] = {"weight_block_size": list(self.block)} if self.block else {}
        found: dict[str, object] = {"quant_method": self.name, "activation_scheme": "dynamic"}
        return found | block | {"ignored_layers": self.left_alone(), "ignore": self.left_alone()}


class W8a8Fp8Writer(W8a8Int8Writer):
    """SGLang's per-channel e4m3."""

    name = "w8a8_fp8"
    writes = "e4m3 per channel"
    misread = (
        f"w8a8_fp8 is SGLang's; {NOT_IN_TRANSFORMERS}. The same numbers for transformers: "
        "--format compressed-tensors"
    )
    code = "e4m3"
    limit = 448.0


class BlockwiseInt8Writer(W8a8Int8Writer):
    """SGLang's int8 in blocks."""

    name = "blockwise_int8"
    writes = "int8 in blocks"
    misread = (
        f"blockwise_int8 is SGLang's; {NOT_IN_TRANSFORMERS}. For transformers: --format compressed-tensors "
        "--requantize, or --format dense"
    )
    scale_name = "weight_scale_inv"
    blocks = True


WRITERS = (Fp8Writer, W8a8Int8Writer, W8a8Fp8Writer, BlockwiseInt8Writer)
