"""W4AFP8 checkpoints, as SGLang loads DeepSeek's: FP8 in blocks, but experts of 4 bits with FP8 inputs.

    weight            I8 [out, in / 2]    experts: two codes a byte, the even column low, two's complement
    weight_scale_inv  F32, BF16 [out, in / 128]
    input_scale       one number an expert and projection, under experts.N.w1, w2 and w3 beside weights
                      that are gate_proj, down_proj and up_proj, or under the weights' own names
    weight            F8_E4M3             everything else, as in ``fp8`` with blocks of 128 x 128

    weight[r, c] = code[r, c] * weight_scale_inv[r, c // 128]        code from -8 to 7

An expert's input is rounded to e4m3 under one static scale: the largest ``input_scale`` of all experts of its
layer, gate and up together, as the engine takes it (its kernel asks for one). Other inputs are rounded per
token and 128 columns. The scales are float32 here; the engine rounds them to bfloat16 for its kernel.
TensorRT-LLM writes these files. They say MIXED_PRECISION in hf_quant_config.json and nothing in config.json;
others have quant_method w4afp8.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, Notes, StoredModule, finite_scales
from lowbit.formats.fp8 import Fp8
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)")
_DOWN = ("down_proj", "w2")
_OTHER_NAME = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class W4AFp8(Fp8):
    """See the module docstring."""

    name: ClassVar[str] = "w4afp8"
    aliases: tuple[str, ...] = ()
    reference: ClassVar[str] = "sglang"
    methods = ("w4afp8",)
    packed_codes = "int4"
    packed_block = (1, 128)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        super().__init__(header, notes)
        self.static = False  # of what is FP8; the experts' scales are always there
        self.block = self.block or (128, 128)
        self.aliases = ()
        self._largest: dict[tuple[str, bool], Tensor] = {}
        self._scales: dict[tuple[str, bool], list[str]] = {}  # (experts, whether down) -> input scales
        for name in header.tensors:
            own = _EXPERT.fullmatch(name.removesuffix(".input_scale"))
            if own is not None and name.endswith(".input_scale"):
                self._scales.setdefault((own["experts"], own["leaf"] in _DOWN), []).append(name)

    def _beside(self, module: StoredModule) -> list[str]:
        """With the expert's own input scale, which may lie under another name."""
        found, other = super()._beside(module), self._other_scale(module)
        return [*found, other] if other in self.header.tensors else found

    def _other_scale(self, module: StoredModule) -> str:
        """What TensorRT-LLM calls the expert's input scale; "" where it has no other name."""
        own = _EXPERT.fullmatch(module.stored)
        leaf = None if own is None else _OTHER_NAME.get(own["leaf"])
        return (
            "" if own is None or leaf is None else f"{module.stored[: own.start('leaf')]}{leaf}.input_scale"
        )

    def _activation(self, block: tuple[int, int], packed: bool) -> ActivationScheme | None:
        if packed:
            return ActivationScheme(number_format("e4m3"), (0, 0), "static")
        return super()._activation(block, packed)

    def _unpacked(self, stored: Tensor, columns: int) -> Tensor:
        return super()._unpacked(stored, columns) ^ 8  # two's complement to offset binary

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        _, _, packed = self._entries(module)
        return InputRule(static_scale=self._layer_scale(module, data)) if packed else None

    def _layer_scale(self, module: StoredModule, data: TensorData) -> Tensor:
        """The largest input scale of the layer's experts, float32."""
        own = _EXPERT.fullmatch(module.stored)
        if own is None:
            raise LowbitError(
                "E0218",
                f"{self.header.file_of(module.tensor('weight'))}: {module.stored!r} is packed in 4 bits but "
                "is no expert by its name; only experts stored one by one are read",
            )
        name = module.tensor("input_scale")
        if not {name, self._other_scale(module)} & set(self.header.tensors):
            raise LowbitError(
                "E0209",
                f"{self.header.root.name}: no file contains {name!r}, the scale of an expert's FP8 input, "
                f"nor {self._other_scale(module)!r}",
            )
        key = (own["experts"], own["leaf"] in _DOWN)
        if key not in self._largest:
            names = self._scales[key]
            stored = [finite_scales(self.header, name, data.tensor(name)).float().max() for name in names]
            self._largest[key] = torch.stack(stored).max()
        return self._largest[key]


FORMAT = W4AFp8
