"""gpu_lattice: codes of E8's vectors beside their definition.

x is float16 between the transforms, 2^-12 of each number, and the definition's weights are float16, rounded
once more: both are far below bfloat16's own 2^-9.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import canonical, lattice, rank_of_lattice
from lowbit.errors import LowbitError
from lowbit.kernels import Use, choose
from lowbit.kernels.gpu.lattice import GpuLattice
from lowbit.numerics.scheme import ActivationScheme, number_format

KERNEL = GpuLattice()
KINDS = {
    "powers of two": lambda: lattice(shape=(64, 128)),
    "two codes": lambda: lattice(3.45, (64, 256)),
    "a second code of 8 bits": lambda: lattice(2.04, (64, 192), second=8),
    "heads of 12 and 20": lambda: lattice(shape=(80, 192)),
    "a rank's rows": lambda: rank_of_lattice(lattice(3.45, (96, 128))),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_and_unpack(name: str, tokens: int, device: torch.device) -> None:
    weight = KINDS[name]()
    rows, columns = weight.shape
    packed = KERNEL.pack(weight, device)
    assert packed.nbytes == KERNEL.nbytes(weight.scheme, weight.shape)
    packed = KERNEL.restore(packed.scheme, packed.shape, dict(packed.buffers), "test")
    assert torch.equal(KERNEL.unpack(packed).codes.cpu(), weight.codes)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    wide = torch.full((tokens, rows + 3), torch.nan, device=device)
    out = wide[:, :rows]
    assert KERNEL.linear(x.to(device), packed, out) is out
    assert wide[:, rows:].isnan().all() and not out.isnan().any()
    exact = weight.dequantize().double()
    norms = x.double().norm(dim=1)[:, None] * exact.norm(dim=1)
    assert float(((out.cpu().double() - x.double() @ exact.T).abs() / norms).max()) < 2**-11
    assert KERNEL.linear(x.to(device), packed).dtype is torch.bfloat16


def test_what_is_refused(device: torch.device) -> None:
    weight = lattice()
    scheme, shape = weight.scheme, weight.shape
    assert choose(scheme, shape, device).kernel.name == "gpu_lattice"
    looked_up = choose(scheme, shape, device, Use(lookup=True))
    assert ("gpu_lattice", "a row is made of all rows' codes") in looked_up.refusals
    assert KERNEL.refuses(canonical("int4", 32).scheme, (37, 256), device) == (
        "weights are no vectors of a lattice"
    )
    assert "no whole vectors of 8" in str(KERNEL.refuses(scheme, (64, 100), device))
    assert "no Hadamard matrix of order 66" in str(KERNEL.refuses(scheme, (66, 128), device))
    quantized = replace(scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "quantizes its input" in str(KERNEL.refuses(quantized, shape, device))
    packed = KERNEL.pack(weight, device)
    for name in packed.buffers:
        damaged = packed.buffers | {name: packed.buffers[name][:0]}
        with pytest.raises(ValueError, match=rf"^test: no {name} of torch"):
            KERNEL.restore(scheme, shape, damaged, "test")
    assert KERNEL.linear(torch.empty(0, 128, device=device), packed).shape == (0, 64)
    with pytest.raises(LowbitError, match="127 columns, weight 128"):
        KERNEL.linear(torch.ones(1, 127, device=device), packed)
