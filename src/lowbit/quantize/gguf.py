"""gguf: llama.cpp's block types, in its mixes: ``--quantization gguf --gguf-type q4_k_m``.

``type``: a mix of llama-quantize (q4_k_m: Q4_K with Q6_K for what loses most), which also says what the head
and the embedding get; ``pure``: the mix's base type everywhere. What a mix leaves in floats, and what GGUF
has no name for, stays as it is. Codes are ggml's to the last bit (``gguf_blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.gguf_blocks import block_weights, encode
from lowbit.quantize.gguf_mixes import MIXES, mix_name, type_of
from lowbit.quantize.method import Coded, Method, Module, Quantized, sliced
from lowbit.quantize.specification import MethodSpec

_FLOATS = {"F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class GgufMix:
    """A mix, or one type for every layer."""

    spec: MethodSpec
    mix: str
    pure: bool

    def refuses(self, module: Module) -> str | None:
        """Where the mix leaves the tensor alone or its rows do not fit."""
        if not module.gguf_name:
            return "GGUF has no name for it"
        if self._type(module) is None:
            return f"{self.mix} leaves it in floats"
        if self.pure and module.shape[1] % block_weights(MIXES[self.mix]):
            return f"needs in % {block_weights(MIXES[self.mix])} == 0, got {module.shape[1]}"
        return None

    def _type(self, module: Module) -> str | None:
        found = type_of(self.mix, module.facts, f"{module.gguf_name}.weight", module.shape)
        return MIXES[self.mix] if self.pure and found is not None else found

    def scheme_of(self, module: Module) -> Scheme:
        """Raw blocks of the type."""
        name = self._type(module)
        assert name is not None, "refuses() was asked first"
        return dense(_FLOATS[name]) if name in _FLOATS else Scheme(number_format(f"gguf_{name.lower()}"))

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Rows stand alone, so that their order does not matter."""
        name, scheme = self._type(module), self.scheme_of(module)
        assert name is not None, "refuses() was asked first"

        def blocks(rows: Tensor) -> Coded:
            return Coded(rows.to(scheme.weight.dtype) if scheme.is_dense else encode(name, rows))

        try:
            return Quantized(sliced(scheme, weight, origin, blocks, raw=True))
        except LowbitError as error:
            raise LowbitError(error.code, f"{origin}: {error.message}") from None


def build(spec: MethodSpec) -> Method:
    """The method of a specification; E0402 where there is no such type."""
    return GgufMix(spec, mix_name(str(spec.options["type"])), bool(spec.options["pure"]))
