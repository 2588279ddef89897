"""A small model whose linears HQQ would have quantized along axis 0, written by hand, and its float twin."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.formats.hqq import pack
from models.family_cases import SIZES, saved, write_checkpoint


def by_columns(weight: Tensor, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """4 bits, ``size`` numbers of a column a group: the layer's state, and float32 what it means."""
    grid = weight.float().reshape(size, -1)
    low, high = grid.amin(0, keepdim=True), grid.amax(0, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).half()
    codes = (grid / scale.float() + zero.float()).round().clamp(0, 15)
    state = {"W_q": pack(codes.to(torch.uint8), 4), "scale": scale, "zero": zero}
    state |= {"shape": torch.tensor(weight.shape), "nbits": torch.tensor(4, dtype=torch.int32)}
    state |= {"group_size": torch.tensor(size, dtype=torch.int32), "axis": torch.tensor(0, dtype=torch.int32)}
    return state, ((codes - zero.float()) * scale.float()).view(weight.shape)


def columns_llama(folder: Path, size: int) -> tuple[Path, Path]:
    """(quantized, in floats) of two layers with biases; K and V have 32 rows, the rest more."""
    config = saved("Llama", folder / "made", **SIZES | {"num_hidden_layers": 2}, attention_bias=True).config
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "made" / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = tensor
            continue
        state, plain[name] = by_columns(tensor, min(size, len(tensor)))
        stored |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in state.items()}
    told = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    rule = {"weight_quant_params": {"nbits": 4, "group_size": size, "axis": 0}}
    hqq = {"quant_method": "hqq", "quant_config": rule, "skip_modules": ["lm_head"]}
    write_checkpoint(folder / "quantized", told | {"quantization_config": hqq}, stored)
    write_checkpoint(folder / "plain", told, plain)
    return folder / "quantized", folder / "plain"
