"""What ``kernels.gpu.assembly`` writes, instruction by instruction, beside what bytes are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical
from gpu.ptx_stand_in import Block, run
from gpu.test_gpu_linear import BLOCKS, normal_form
from lowbit.kernels.gpu import assembly, language, runtime, weight_tiles
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
PAIRS = np.arange(1 << 16, dtype=np.uint32)  # of two bytes, all
BYTES = torch.from_numpy(PAIRS.astype(np.uint16)).view(torch.uint8).view(-1, 2)


def halves(lines: list[str], dtype: torch.dtype, *more: np.ndarray) -> Tensor:
    """float64 (65536, 2): what the text makes of all pairs of bytes."""
    found = run(assembly.assembled(lines), [PAIRS, *more])
    return torch.from_numpy(found.view(np.uint16)).view(dtype).view(-1, 2).double()


@TYPES
@pytest.mark.parametrize(("bits", "shift"), [(4, 0), (4, 4), (2, 0), (2, 2), (2, 6), (1, 5), (1, 7)])
def test_bits_behind_a_significand(bits: int, shift: int, dtype: torch.dtype) -> None:
    brain = dtype is torch.bfloat16
    found = halves(assembly.low_bits_text(shift, bits, brain), dtype)
    wanted = (BYTES.int() >> shift & (1 << bits) - 1) + (128 if brain else 1024)
    assert torch.equal(found, wanted.double())


@TYPES
@pytest.mark.parametrize(("bits", "more"), [(4, 2), (4, 1), (2, 1)])
def test_bits_of_a_second_plane(bits: int, more: int, dtype: torch.dtype) -> None:
    brain = dtype is torch.bfloat16
    other = np.random.default_rng(1).integers(0, 1 << 16, len(PAIRS), dtype=np.uint32)
    upper = torch.from_numpy(other.astype(np.uint16)).view(torch.uint8).view(-1, 2).int()
    for place in range(8 // more):
        shift = np.full(len(PAIRS), place * more + 8 - bits, np.uint32)
        text = assembly.low_bits_text(0, bits, brain) + assembly.high_bits_text(bits, more)
        found = halves(text, dtype, other, shift, shift)
        wanted = BYTES.int() & (1 << bits) - 1 | (upper >> place * more & (1 << more) - 1) << bits
        assert torch.equal(found, (wanted + (128 if brain else 1024)).double())


@TYPES
def test_int8(dtype: torch.dtype) -> None:
    found = halves(assembly.byte_text(dtype is torch.bfloat16), dtype)
    wanted = BYTES.view(torch.int8).double()
    assert torch.equal(found, wanted if dtype is torch.bfloat16 else wanted + 128 + 1024)


@TYPES
@pytest.mark.parametrize(("kind", "field"), [("e2m1", 0), ("e2m1", 1), ("e4m3", 0)])
def test_small_floats(kind: str, field: int, dtype: torch.dtype) -> None:
    found = halves(assembly.small_float_text(kind, field, dtype is torch.bfloat16), dtype)
    codes = BYTES >> 4 * field & 15 if kind == "e2m1" else BYTES
    wanted = number_format(kind).table()[codes.long()].double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[wanted == 0], wanted.signbit()[wanted == 0])


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton's interpreter takes the compiler's way, and has PTX; the texts that it ran."""
    if not runtime.INTERPRETED:
        pytest.skip("the GPU runs it itself")
    from triton.runtime.interpreter import InterpreterBuilder

    texts: list[str] = []

    def create(builder: object, text: str, *given: object) -> Block:
        texts.append(text)
        return Block(text, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_tiles, "INTERPRETED", type(language.INTERPRETED)(False))
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create, raising=False)
    return texts


WEIGHTS = {
    **{
        f"int{bits}": (lambda bits=bits: canonical(f"int{bits}", 32, shape=(37, 192)))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{
        f"uint{bits} zero": (lambda bits=bits: canonical(f"uint{bits}", 64, zero=True, shape=(37, 320)))
        for bits in (1, 2, 3, 4, 5, 6, 8)
    },
    "e2m1": lambda: canonical("e2m1", 32, "e8m0", shape=(37, 192)),
    "e4m3": lambda: canonical("e4m3", 0, shape=(37, 192)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_few_tokens_times_weights(name: str, assembled: list[str], device: torch.device) -> None:
    """float16, as the interpreter computes in no bfloat16."""
    weight: QuantizedTensor = WEIGHTS[name]()
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).half()
    found = BLOCKS.linear(x.to(device), BLOCKS.pack(weight, device), torch.empty(3, 37, device=device))
    exact = normal_form(weight).double()
    scale = x.double().abs() @ exact.abs().T
    assert assembled, "no block was run"
    assert float(((found.cpu().double() - x.double() @ exact.T).abs() / scale.clamp(min=1e-30)).max()) < 1e-6
