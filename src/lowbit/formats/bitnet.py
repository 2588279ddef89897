"""BitNet b1.58 (Ma et al., 2024) as transformers stores it: weights of -1, 0 and 1, inputs rounded to int8.

    weight         U8 [out / 4, in]    byte [r, c]: t[r] | t[r + R] << 2 | t[r + 2 R] << 4 | t[r + 3 R] << 6,
                                       R = out / 4, t = weight + 1; 3 is no weight
    weight_scale   BF16, F16 or F32 [1]
    bias           [out]

``linear_class`` says what the scale means: "bitlinear" (where nothing is said) divides by it, "autobitlinear"
multiplies with it, the bias as well; autobitlinear's weights may also be floats of -1, 0 and 1, as
transformers keeps them when it saves such a model again. ``quantization_mode`` "online" (autobitlinear's
only) stores plain floats without a scale, which are rounded here as the layer does in each forward pass: with
m the mean of |w|, clamp(round(w / m), -1, 1) * m, in the weight's own type. Which modules that concerns only
the config can tell: all Linears but the output head, or but those of ``modules_to_not_convert``; offline one
of these without a scale is an error. A router is no Linear to transformers 5 and plain where it has no scale
(version 4 converted many). A head tied to the embedding that this list leaves out is refused: the head alone
would be rounded.

Inputs are int8 with one scale a token, the largest |x| over 127, and at least 1e-5 / 127. (The layer computes
127 / the largest |x| and multiplies; an input on the border of two codes may fall to the other side.)
Refused: ``use_rms_norm``, a norm inside each layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import DENSE_DTYPES, dense_scheme, of_expert, origin_of
from lowbit.formats.matching import listed, module_prefix, strings
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

INPUTS = ActivationScheme(number_format("int8"), (1, 0), limit=127.0, floor=1e-5 / 127)
_SMALLEST_MEAN = 1e-5
_ROUTERS = ("gate", "router")  # as the models here call them
_WHAT = "BitNet"


class BitNet(PartlyDense):
    """See the module docstring."""

    name = "bitnet"
    reference = "transformers"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        values = found.values
        self.multiplies = self._chosen(values, "linear_class", ("bitlinear", "autobitlinear")) != "bitlinear"
        self.online = self._chosen(values, "quantization_mode", ("offline", "online")) == "online"
        if values.get("use_rms_norm") not in (None, False):
            raise LowbitError(
                "E0218",
                f"{self.place}: use_rms_norm {printable(repr(values['use_rms_norm']))} asks for a norm "
                "inside each Linear, which is not supported; use a GGUF version (TQ2_0)",
            )
        if self.online and not self.multiplies:
            raise LowbitError(
                "E0212",
                f"{self.place}: quantization_mode online needs linear_class autobitlinear, found "
                f"{printable(repr(values.get('linear_class', 'bitlinear')))}; correct the config",
            )
        kept = values.get("modules_to_not_convert")
        self.kept = strings(kept, "modules_to_not_convert", self.place)
        self.keeps_head = kept is None
        packed = any(
            entry.dtype == "U8" and name.endswith(".weight") for name, entry in header.tensors.items()
        )
        scaled = any(name.endswith(".weight_scale") for name in header.tensors)
        if self.online and (packed or scaled):
            raise LowbitError(
                "E0213",
                f"{header.root.name}: {self.place} says quantization_mode online, plain floats that are "
                "rounded at run time, but there are packed weights or weight scales; it must say offline",
            )
        tied = header.config.get("tie_word_embeddings") is True and "lm_head.weight" not in header.tensors
        if self.online and tied and not (self.keeps_head or listed("lm_head", self.kept, module_prefix)):
            raise LowbitError(
                "E0218",
                f"{self.place}.modules_to_not_convert leaves out lm_head, which is tied to the embedding: "
                "the head alone would be rounded at run time, which is not supported; add lm_head",
            )
        if not self.online and not scaled:
            raise LowbitError(
                "E0213",
                f"{header.root.name}: {self.place} says bitnet but no tensor ends in .weight_scale; if the "
                "weights are to be rounded at run time it must say quantization_mode online, if the model "
                "was dequantized, remove the quantization config",
            )

    def _chosen(self, values: dict[str, object], key: str, choices: tuple[str, str]) -> str:
        """A word of the config, the first choice where it says nothing."""
        told = values.get(key, choices[0])
        if told not in choices:
            raise LowbitError(
                "E0212",
                f"{self.place}: {key} must be {' or '.join(choices)}, found {printable(repr(told))}",
            )
        return str(told)

    def describe(self) -> str:
        """The class of its layers, and when they are rounded."""
        mode = "rounded at load" if self.online else "packed"
        return f"bitnet, {'autobitlinear' if self.multiplies else 'bitlinear'}, {mode}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """Ternary codes under one scale."""
        if self.online:
            return _ternary(dense_scheme(self.header, module).weight.name)
        return _ternary(self._stored(module)[1])

    def _tensors(self, module: StoredModule) -> list[str]:
        """Weight and scale; before it is rounded the weight alone."""
        suffixes = ("weight",) if self.online else ("weight", "weight_scale")
        return [module.tensor(suffix) for suffix in suffixes]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, or rounded from floats."""
        if self.online:
            weight = of_expert(module, data.tensor(module.tensor("weight")))
            weight = weight.T if module.expert is not None and module.transposed else weight
            codes, scale = rounded(finite_scales(self.header, module.tensor("weight"), weight))
        else:
            codes, scale = self._packed(module, data)
        return QuantizedTensor(
            self.scheme_of(module),
            module.shape,
            codes,
            (scale.reshape(1, 1),),
            origin=origin_of(self.header, module),
        )

    def _bias(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """AutoBitLinear adds it before it multiplies with the scale."""
        bias = super()._bias(module, data)
        if bias is None or self.online or not self.multiplies:
            return bias
        return bias.float() * data.tensor(module.tensor("weight_scale")).float().reshape(())

    def _is_dense(self, module: StoredModule) -> bool:
        return not self._is_quantized(module)

    def _is_quantized(self, module: StoredModule) -> bool:
        entry = self.header.tensors.get(module.tensor("weight"))
        if entry is not None and entry.dtype == "U8":
            return True
        if not self.online and module.tensor("weight_scale") in self.header.tensors:
            return True
        if module.name.rpartition(".")[2] in _ROUTERS:
            return False
        leaf = module.stored.rpartition(".")[2]
        if leaf == "embed_tokens" or (self.keeps_head and leaf in ("lm_head", "embed_out", "output")):
            return False
        return not listed(module.stored, self.kept, module_prefix)

    def _stored(self, module: StoredModule) -> tuple[TensorEntry, str]:
        """(the weight, the number format of its canonical scale), checked."""
        plain = tuple(DENSE_DTYPES) if self.multiplies else ()
        weight = entry_of(self.header, module, "weight", ("U8", *plain), _WHAT)
        scale = entry_of(self.header, module, "weight_scale", tuple(DENSE_DTYPES), _WHAT)
        if module.expert is not None:
            raise LowbitError(
                "E0218",
                f"{weight.file.name}: {module.stored!r} is a stack of experts, which BitNet does not pack; "
                "use a version with a module for each expert",
            )
        out, columns = module.shape
        if weight.dtype != "U8":
            check_shape(weight, (out, columns), f"{_WHAT} unpacked")
        elif out % 4:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} of a {out} x {columns} layer is packed, four "
                "rows to a byte; config and weights are from different models",
            )
        else:
            check_shape(weight, (out // 4, columns), _WHAT)
        if math.prod(scale.shape) != 1:
            raise LowbitError(
                "E0213",
                f"{scale.file.name}: tensor {scale.name!r} is {list(scale.shape)}; BitNet has one scale a "
                "layer. The file is damaged, or of another method",
            )
        return weight, DENSE_DTYPES[scale.dtype] if self.multiplies else "f32"

    def _packed(self, module: StoredModule, data: TensorData) -> tuple[Tensor, Tensor]:
        """uint8 codes (out, in), and the scale that multiplies them."""
        weight, _ = self._stored(module)
        name = module.tensor("weight_scale")
        scale = finite_scales(self.header, name, data.tensor(name)).reshape(())
        if not self.multiplies:
            if not scale:
                raise LowbitError(
                    "E0215",
                    f"{self.header.file_of(name)}: tensor {name!r} is 0, which bitlinear divides by; the "
                    "file is damaged, download it again",
                )
            scale = 1.0 / scale.float()
        stored = data.tensor(weight.name)
        if weight.dtype == "U8":
            codes = torch.cat([stored >> shift & 3 for shift in (0, 2, 4, 6)])
            wrong = int((codes == 3).sum())
        else:
            codes = (stored + 1).to(torch.uint8)
            wrong = int(((stored != 0) & (stored.abs() != 1)).sum())
        if wrong:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} has {wrong:,} of {codes.numel():,} codes that "
                "are not -1, 0 or 1; it is no BitNet weight, or the file is damaged",
            )
        return codes, scale


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats (out, in) -> uint8 codes and the scale in the weight's type, as AutoBitLinear has them."""
    wide = weight.float()
    scale = 1.0 / wide.abs().mean().clamp(min=_SMALLEST_MEAN)
    codes = (wide * scale).round().clamp(-1, 1) + 1
    return codes.to(torch.uint8), (1.0 / scale).to(weight.dtype)


def _ternary(scale: str) -> Scheme:
    return Scheme(number_format("ternary"), ((0, 0),), (number_format(scale),), activation=INPUTS)


FORMAT = BitNet
