"""MLX, written as mlx-lm reads it: affine groups, mxfp4, mxfp8, nvfp4. The layout is ``mlx``'s.

Affine means code * scale + bias. Offsets are biases as they are. A zero point becomes the bias -zero * scale
and a symmetric code the bias -2^(bits - 1) * scale, exactly: in the scales' own type, or, where that has too
few bits for it, with scales and biases in float32. (Float32 scales have no wider type for the product: those
are refused.) Embeddings are quantized too. Experts would have to be stacked in one tensor, which is not done.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.mlx import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES
from lowbit.formats.writing import CheckpointWriter, cannot, grouped_rows
from lowbit.numerics.bit_packing import pack_words
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

Json = dict[str, object]
_FLOATS = ("f16", "bf16", "f32")


class MlxWriter(CheckpointWriter):
    """See the module docstring."""

    name = "mlx"
    writes = "affine 1-6 and 8 bits (zero points as biases), groups of 32, 64, 128; mxfp4, mxfp8, nvfp4"
    embeddings = True
    config_keys = ("quantization", "quantization_config")

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        self.rules: dict[str, Json] = {}  # of the modules written so far
        for name in self.quantized():
            if re.search(r"\.experts\.\d+\.", name):
                raise LowbitError(
                    "E0450",
                    f"--format mlx: {name} is an expert; MLX keeps all experts in one tensor, which is not "
                    "written. Choose another format (dense holds everything)",
                )

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks, scales, in this order."""
        if scheme.is_dense:
            return None
        if scheme.activation is not None or scheme.reordered:
            return f"it has no place for {scheme}"
        if scheme.flattened or len(scheme.blocks) != 1 or (scheme.blocks[0][0] != 1):
            return grouped_rows(scheme, shape[1]) or f"scales lie as {scheme}"
        group, scale = scheme.blocks[0][1] or shape[1], scheme.scales[0].name
        if shape[1] % group:
            return f"a scale for a group that divides {shape[1]} columns is needed, not {scheme}"
        for mode, (_, size, code, kind) in FLOAT_MODES.items():
            if (scheme.weight.name, scale) == (code, kind) and group == size:
                return "it has no zero points or offsets" if scheme.offset or scheme.zero != "none" else None
            if scheme.weight.name == code and scale == kind:
                return f"{mode} has groups of {size}, not {group}"
        bits = int(scheme.weight.bits)
        if not scheme.weight.is_integer or bits not in AFFINE_BITS:
            modes = ", ".join(FLOAT_MODES)
            return f"codes are integers of {', '.join(map(str, AFFINE_BITS))} bits, or {modes}; not {scheme}"
        if group not in AFFINE_GROUPS or scale not in _FLOATS:
            return f"groups of 32, 64 or 128 under f16, bf16 or f32 are needed, not {scheme}"
        signed = scheme.weight.name.startswith("int")
        if scheme.offset:
            return "codes are unsigned beside offsets" if signed or scheme.zero != "none" else None
        if scheme.zero == "float":
            return "a float zero point times its scale is rounded"
        if scale == "f32" and (signed or scheme.zero == "integer"):
            return "a code times a float32 scale is rounded, with a zero point to another number than without"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        scheme, scale = weight.scheme, weight.scales[0]
        self.rules[module.stored] = _rule(scheme, module.shape)
        codes = pack_words(weight.codes, int(scheme.weight.bits)).view(torch.uint32)
        if scheme.scales[0].name in ("e8m0", "e4m3"):
            return {"weight": codes, "scales": scale.view(torch.uint8)}
        if weight.offsets:
            [biases] = weight.offsets
            if biases.dtype != scale.dtype:
                raise cannot(self.name, module, f"offsets are {biases.dtype}, scales {scale.dtype}")
            return {"weight": codes, "scales": scale, "biases": biases}
        zeros: Tensor | float = 0.0
        if weight.zeros is not None:
            zeros = weight.zeros.float()
        elif scheme.weight.name.startswith("int"):
            zeros = float(1 << int(scheme.weight.bits) - 1)
        exact = -(scale.float() * zeros) + 0.0  # no negative zeros
        narrow = exact.to(scale.dtype)
        if torch.equal(narrow.float(), exact):
            return {"weight": codes, "scales": scale, "biases": narrow}
        return {"weight": codes, "scales": scale.float(), "biases": exact}

    def metadata(self) -> dict[str, str]:
        """As mlx-lm marks its files."""
        return {"format": "mlx"}

    def quantization_config(self) -> Json:
        """The most usual rule of what was written, and one for each module that has another."""
        if not self.rules:
            return {"group_size": 64, "bits": 4, "mode": "affine"}
        [(usual, _)] = Counter(tuple(rule.items()) for rule in self.rules.values()).most_common(1)
        return dict(usual) | {name: rule for name, rule in self.rules.items() if rule != dict(usual)}


def _rule(scheme: Scheme, shape: tuple[int, int]) -> Json:
    mode = next((mode for mode, found in FLOAT_MODES.items() if found[2:] == _kinds(scheme)), "affine")
    return {"group_size": scheme.blocks[0][1] or shape[1], "bits": int(scheme.weight.bits), "mode": mode}


def _kinds(scheme: Scheme) -> tuple[str, str]:
    return scheme.weight.name, scheme.scales[0].name


WRITERS = (MlxWriter,)
