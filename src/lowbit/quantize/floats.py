"""Float methods without data: fp8, w8a8_fp8, mxfp8, mxfp4, nvfp4.

    fp8 channel   scale max|row| / 448, at least 1e-10 / 448 (SGLang's rule); inputs a scale a token
    fp8 tensor    codes w * (448 / max|w|), scale its inverse, max|w| at least 1e-12 (SGLang)
    fp8 block     128 x 128: codes w * (448 / max|block|), scale the inverse (transformers' fine-grained FP8,
                  DeepSeek-V3, 2024); inputs in groups of 128
    mxfp8, mxfp4  one power of two for 32 columns, exponents rounded as compressed-tensors 0.20 does
    nvfp4         e4m3 scales for 16 columns under one float32 of the tensor, max|w| / (6 * 448), as
                  ModelOpt 0.47, but the nearest that is the reciprocal of a float32; of Q, K and V together,
                  and of gate and up (``Module.largest``), as tools that run these as one layer have one scale

Block, mx and nvfp4 weights are the tools' own bit by bit (nvfp4's up to the last bit of that scale), except
that e2m1 numbers that round to -0 get the code of +0, which is worth the same.

Inputs of fp8: a scale a token, one for all tokens of a step, groups of 128 columns, static from a file,
delayed (NVIDIA's Transformer Engine, DelayedScaling), or not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError, printable
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay, Scheme
from lowbit.quantize.integers import block_largest, spread_rows
from lowbit.quantize.method import Coded, Method, Module, Quantized, largest_weight, number, sliced
from lowbit.quantize.recipe import fused_name
from lowbit.quantize.rounding import blocked, e8m0_scale, largest, mx_exponent, scaled_codes
from lowbit.quantize.specification import MethodSpec

_LIMIT = 448.0
_BLOCK = 128


@dataclass(frozen=True)
class Fp8:
    """e4m3 weights with float32 scales; see the module docstring."""

    spec: MethodSpec

    @property
    def _weights(self) -> str:
        return str(self.spec.options.get("weights", "channel"))

    @property
    def _inputs(self) -> str:
        default = "group" if self._weights == "block" else "token"
        return str(self.spec.options.get("activation") or default)

    def refuses(self, module: Module) -> str | None:
        """Where a static scale is not in the file."""
        if self._inputs == "static":
            return self._scales.refuses(module.name)
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """Blocks by the option ``weights``."""
        block = {"channel": (1, 0), "tensor": (0, 0), "block": (_BLOCK, _BLOCK)}[self._weights]
        return Scheme(number_format("e4m3"), (block,), (number_format("f32"),), activation=self._activation())

    def _activation(self) -> ActivationScheme | None:
        e4m3 = number_format("e4m3")
        match self._inputs:
            case "none":
                return None
            case "group":
                return ActivationScheme(e4m3, (1, _BLOCK), limit=_LIMIT)
            case "token":
                return ActivationScheme(e4m3, (1, 0), limit=_LIMIT)
            case "tensor":
                return ActivationScheme(e4m3, (0, 0), limit=_LIMIT)
            case "static":
                return ActivationScheme(e4m3, (0, 0), "static", limit=_LIMIT)
        options = self.spec.options
        algorithm: Literal["max", "most_recent"] = "max" if options["amax"] == "max" else "most_recent"
        delay = Delay(number(options, "history"), number(options, "margin"), algorithm)
        return ActivationScheme(e4m3, (0, 0), "delayed", limit=_LIMIT, delay=delay)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """By channel, tensor or block."""
        scheme = self.scheme_of(module)
        static = self._scales.scale_of(module.name) if self._inputs == "static" else None
        if self._weights == "tensor":
            amax = largest_weight(weight)
            factor = torch.tensor(_LIMIT) / torch.tensor(max(amax, 1e-12))
            quantized = sliced(
                scheme, weight, origin, lambda rows: _times(rows, factor.expand(len(rows), 1), 0)
            )
            return Quantized(replace(quantized, scales=(factor.reciprocal().reshape(1, 1),)), static)
        if self._weights == "block":
            return Quantized(sliced(scheme, weight, origin, _blocks, multiple=_BLOCK), static)
        return Quantized(sliced(scheme, weight, origin, _channels), static)

    @property
    def _scales(self) -> InputScales:
        path = self.spec.options["scales"]
        if not path:
            raise LowbitError(
                "E0402",
                "--quantization fp8:activation=static needs scales=FILE, a safetensors file with "
                "<module>.input_scale for each layer (lowbit writes one from delayed scales)",
            )
        return InputScales(Path(str(path)))


@dataclass(frozen=True)
class InputScales:
    """A safetensors file with ``<module>.input_scale``, float32 scalars, x being about q * input_scale; or
    the states of delayed scales, whose ``<layer>.scale`` is the inverse."""

    path: Path

    def refuses(self, name: str) -> str | None:
        """Why there is no scale for the module, or None."""
        return None if self._tensor(name) else f"{self.path.name} has no {name}.input_scale"

    def _tensor(self, name: str) -> str | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                names = set(file.keys())
        except (OSError, SafetensorError) as error:
            raise LowbitError("E0301", f"{printable(str(self.path))}: {printable(error)}") from None
        wanted = (f"{name}.input_scale", f"{fused_name(name)}.scale")
        return next((tensor for tensor in wanted if tensor in names), None)

    def scale_of(self, name: str) -> Tensor:
        """float32 []: a positive, finite number."""
        from safetensors import safe_open

        tensor = self._tensor(name)
        assert tensor is not None, "refuses() was asked first"
        with safe_open(self.path, "pt") as file:
            scale: Tensor = file.get_tensor(tensor).float()
        if scale.numel() != 1 or not (scale.isfinite().all() and scale.item() > 0):
            raise LowbitError("E0215", f"{self.path.name}: tensor {tensor!r} must be one positive number")
        return scale.reshape(()) if tensor.endswith("input_scale") else scale.reshape(()).reciprocal()


def _times(rows: Tensor, factor: Tensor, size: int) -> Coded:
    """Codes of rows * factor (rows, blocks); no scales."""
    steps = blocked(rows, size) * factor.unsqueeze(-1)
    codes = steps.clamp(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn).view(torch.uint8)
    return Coded(codes.flatten(1)[:, : rows.shape[1]])


def _channels(rows: Tensor) -> Coded:
    scale = largest(rows, 0).clamp(min=1e-10) / _LIMIT
    return Coded(scaled_codes(rows, scale, 0, number_format("e4m3")), (scale,))


def _blocks(rows: Tensor) -> Coded:
    amax = block_largest(rows, _BLOCK)
    # Blocks of subnormals would get an infinite factor, and NaN where they have a zero.
    factor = torch.where(amax > 0, _LIMIT / amax, 1.0).clamp(max=torch.finfo(torch.float32).max)
    coded = _times(rows, spread_rows(factor, _BLOCK, len(rows)), _BLOCK)
    return Coded(coded.codes, (factor.reciprocal(),))


@dataclass(frozen=True)
class Microscaled:
    """e4m3 or e2m1 in groups of 32 under powers of two (OCP MX)."""

    spec: MethodSpec
    code: str

    def refuses(self, module: Module) -> str | None:
        """Where groups of 32 do not fit."""
        columns = module.shape[1]
        return f"needs in % 32 == 0, got {columns}" if columns % 32 else None

    def scheme_of(self, module: Module) -> Scheme:
        """e8m0 scales."""
        fmt, e8m0 = number_format(self.code), number_format("e8m0")
        inputs = None
        if self.spec.options["activation"] == "group":
            inputs = ActivationScheme(fmt, (1, 32), scale=e8m0, round_up=self._round_up)
        return Scheme(fmt, ((1, 32),), (e8m0,), activation=inputs)

    @property
    def _round_up(self) -> float:
        # compressed-tensors rounds amax to the element's own mantissa bits and one more: 1.75 for one bit of
        # mantissa; it uses the same rule for e4m3.
        return 1.75

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Nearest even, saturating."""
        scheme = self.scheme_of(module)

        def encode(rows: Tensor) -> Coded:
            scale = e8m0_scale(mx_exponent(largest(rows, 32), scheme.weight, self._round_up))
            return Coded(scaled_codes(rows, scale.float(), 32, scheme.weight), (scale,))

        return Quantized(sliced(scheme, weight, origin, encode))


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 with e4m3 scales for 16 columns under a float32 of the tensor (ModelOpt's weight_scale_2)."""

    spec: MethodSpec

    def refuses(self, module: Module) -> str | None:
        """Where groups of 16 do not fit."""
        columns = module.shape[1]
        return f"needs in % 16 == 0, got {columns}" if columns % 16 else None

    def scheme_of(self, module: Module) -> Scheme:
        """Two levels of scales."""
        scales = (number_format("e4m3"), number_format("f32"))
        return Scheme(number_format("e2m1"), ((1, 16), (0, 0)), scales)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """scale2 = 1 / (6 * 448 / max|w|); scale = e4m3(max|block| / (6 * scale2)), at least 2^-9."""
        scheme = self.scheme_of(module)
        amax = module.largest or largest_weight(weight)
        smallest = torch.finfo(torch.float32).smallest_normal
        # The reciprocal of a float32: compressed-tensors stores that one, ModelOpt the scale itself.
        outer = torch.tensor(max(amax / (6 * _LIMIT), smallest) if amax else 1.0).reciprocal().reciprocal()

        def encode(rows: Tensor) -> Coded:
            inner = (largest(rows, 16) / (6 * outer)).clamp(2.0**-9, _LIMIT).to(torch.float8_e4m3fn)
            codes = scaled_codes(rows, inner.float() * outer, 16, scheme.weight)
            return Coded(codes, (inner,))

        quantized = sliced(scheme, weight, origin, encode)
        return Quantized(replace(quantized, scales=(*quantized.scales, outer.reshape(1, 1))))


def build(spec: MethodSpec) -> Method:
    """The method of a specification."""
    match spec.name:
        case "mxfp8":
            return Microscaled(spec, "e4m3")
        case "mxfp4":
            return Microscaled(spec, "e2m1")
        case "nvfp4":
            return Nvfp4(spec)
    return Fp8(spec)
