"""compressed-tensors cases written by hand: configs, packed modules, and what reading them must end in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import read
from lowbit.errors import LowbitError
from lowbit.numerics.bit_packing import pack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

NAME = "model.layers.0.mlp.down_proj"
INT8_TOKEN = ActivationScheme(number_format("int8"), (1, 0), limit=127.5)
FP8_TOKEN = ActivationScheme(number_format("e4m3"), (1, 0))
MX8_INPUT = ActivationScheme(number_format("e4m3"), (1, 32), scale=number_format("e8m0"), round_up=1.75)


def args(
    bits: int = 4, kind: str = "int", strategy: str = "group", group: int | None = 32, **more: object
) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, **more}


def config(weights: dict | None, inputs: dict | None = None, **more: object) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
        "version": "0.20.0",
        **more,
    }


def packed(
    bits: int = 4,
    shape: tuple[int, int] = (16, 64),
    group: int = 32,
    *,
    padded: bool = False,
    asymmetric: bool = False,
    name: str = NAME,
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, float32 weight) of one pack-quantized module."""
    generator = torch.Generator().manual_seed(bits)
    out, columns = shape
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, groups, generator=generator) - 0.3
    zeros = torch.full((out, groups), 1 << bits - 1, dtype=torch.uint8)
    if asymmetric:
        zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8)
    tensors = {
        f"{name}.weight_packed": trimmed(codes, bits, padded, 1),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(shape),
    }
    if asymmetric:
        tensors[f"{name}.weight_zero_point"] = trimmed(zeros, bits, padded, 0)
    which = torch.arange(columns) // group
    return tensors, (codes.float() - zeros.float()[:, which]) * scales[:, which]


def trimmed(codes: Tensor, bits: int, padded: bool, dim: int) -> Tensor:
    """Words as the tool cuts them: no more than the codes need."""
    count = codes.shape[dim]
    words = -(-count // (32 // bits)) if padded else -(-count * bits // 32)
    return pack_words(codes, bits, dim=dim, padded=padded).narrow(dim, 0, words).contiguous()


def fails(
    folder: Path, code: str, *words: str, shape: tuple[int, int] = (16, 64), strict: bool = False
) -> None:
    """Reading the module ends in the code, in one line that has all the words."""
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, shape, strict)
    assert caught.value.code == code, caught.value.message
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message
