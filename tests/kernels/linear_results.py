"""What linear layers give under this instruction set, for every kind of input; as a script, into a file."""

from __future__ import annotations

import sys

import numpy as np
import torch

from contract.test_linear_kernels import canonical, ragged, vectors
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.cpu_vectors import CpuVectors
from lowbit.kernels.packed_linear import NativeWeight
from lowbit.kernels.prompt_rows import prompt_rows
from lowbit.numerics.quantized_tensor import QuantizedTensor

# enum InputKind of csrc/linear_layout.h; prompts: tokens for which AMX rounds weights
KINDS = {"bfloat": 0, "groups": 1, "codes": 2, "prompts": 0}
WRONG = {"groups": 0.02, "prompts": 2**-8}  # at most, of the sum of all products' sizes; others 3e-6
TOKENS = (1, 17, 130)


def weights() -> dict[str, QuantizedTensor]:
    """Every way of reading bytes, groups below, of and above a line of 64, odd numbers of tiles."""
    return {
        "int4 g32": canonical("int4", 32),
        "int4 g32, 9 tiles": canonical("int4", 32, shape=(37, 288)),
        "int4 g32, many blocks": canonical("int4", 32, shape=(700, 288)),
        "uint4 g64 bf16 offset": canonical("uint4", 64, "bf16", offset=True),
        "uint4 g128 zero, many blocks": canonical("uint4", 128, zero=True, shape=(700, 1152)),
        "uint4 g96 zero": canonical("uint4", 96, zero=True, shape=(37, 864)),
        "uint4 g192 offset": canonical("uint4", 192, offset=True, shape=(37, 1920)),
        "uint2 g64 zero": canonical("uint2", 64, zero=True),
        "uint3 g128 zero": canonical("uint3", 128, zero=True),
        "int5 g64": canonical("int5", 64),
        "int6 g16, 9 tiles": canonical("int6", 16, shape=(37, 288)),
        "int7 g16 f32 offset": canonical("int7", 16, "f32", offset=True),
        "e2m1 g32 e8m0": canonical("e2m1", 32, "e8m0"),
        "int8 channel": canonical("int8", 0, "f32", shape=(70, 1280)),
        "uint8 g32 zero": canonical("uint8", 32, zero=True),
        "uint8 g128 zero, last group short": ragged("uint8", 128, 192),
        "codebooks 1x8 of 2 g64": vectors(1, 8, 2, group=64),
        "codebooks 1x6 of 4 bf16 g32": vectors(1, 6, 4, "bf16", (37, 288), group=32),
    }


def results() -> dict[str, np.ndarray]:
    """name -> outputs; a row alone has the same bits, and each is nearly the product."""
    made = {}
    for name, weight in weights().items():
        coded = weight.scheme.weight.vectors is not None
        kernel = CpuVectors() if coded else CpuBlocks()
        packed = kernel.pack(weight, torch.device("cpu"))
        assert isinstance(packed, NativeWeight)
        exact = weight.dequantize().double()
        for kind, number in KINDS.items():
            if coded and kind in ("groups", "codes"):
                continue  # codebooks meet x as words, or rounded with bfloat16
            packed.description.input = number
            for tokens in TOKENS:
                generator = torch.Generator().manual_seed(tokens)
                x = torch.randn((tokens, weight.shape[1]), generator=generator)
                if kind == "codes":
                    x = torch.randint(-127, 128, x.shape, generator=generator).float()
                first = 0 if kind == "prompts" else None
                with prompt_rows(first, tokens):
                    out = kernel.linear(x, packed)
                case = f"{kind}, {name}, {tokens} tokens"
                with prompt_rows(first, 1):
                    for row in {0, tokens // 2, tokens - 1}:
                        assert torch.equal(kernel.linear(x[row : row + 1], packed)[0], out[row]), (case, row)
                rounded = kind == "prompts" or (kind == "bfloat" and not coded)
                seen = (x.bfloat16() if rounded else x).double()
                error = (out - seen @ exact.T).abs() / (seen.abs() @ exact.abs().T).clamp(min=1e-30)
                limit = WRONG.get(kind, 3e-5 if coded else 3e-6)  # words of 15 bits
                assert error.max() < limit, (case, error.max())
                made[case] = out.numpy()
    return made


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
