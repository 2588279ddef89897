"""Each data-free method against the tool itself, where it is installed: larger weights, cut in many slices.

The tools: torchao 0.18, bitsandbytes 0.50, hqq 0.2.8, compressed-tensors 0.20, transformers 5.23,
nvidia-modelopt 0.47, all on a CPU. The golden files say the same of small weights without any of them.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform, limit_of
from lowbit.numerics.llm_int8 import INT8_STEP
from lowbit.quantize import method
from oracles import quantizers as oracle
from quantize.helpers import agrees, module_of, scheme_of
from quantize.tools import ACTIVATIONS, PACKAGES, TOOLS, cruel

pytestmark = pytest.mark.slow

VERSIONS = {
    "torchao": "0.18",
    "bitsandbytes": "0.50",
    "hqq": "0.2.8",
    "compressed_tensors": "0.20",
    "transformers": "5.",
    "modelopt": "0.47",
}
CASES = [f"{tool}/{name}" for tool, cases in TOOLS.items() for name in cases]


def need(tool: str) -> None:
    """Skip without the tool, or with one whose numerics may be others'."""
    try:
        version = importlib.metadata.version(PACKAGES.get(tool, tool))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGES.get(tool, tool)} is not installed")
    if not version.startswith(VERSIONS[tool]):
        pytest.skip(f"{tool} {version} is installed, {VERSIONS[tool]} is compared with")


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """As a model's: a size a row, few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= torch.rand(rows, 1, generator=generator) + 0.5
    weight[torch.rand(rows, columns, generator=generator) < 1e-3] *= 20
    return weight.to(dtype)


@pytest.mark.parametrize("data", ["cruel", "gaussian"])
@pytest.mark.parametrize("case", CASES)
def test_the_tool(case: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, name = case.split("/")
    need(tool)
    what = TOOLS[tool][name]
    columns = 4 * what.shape[1]
    weight = cruel(48, columns, what.dtype, 3) if data == "cruel" else gaussian(272, columns, what.dtype, 5)
    if tool != "hqq":  # its error is a mean over the whole weight, taken slice by slice
        monkeypatch.setattr(method, "SLICE_WEIGHTS", 5 * columns)
    agrees(case, what.method, {"weight": weight, **what.make(weight)})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torchao_inputs(name: str) -> None:
    need("torchao")
    x = torch.cat((cruel(20, 384, torch.bfloat16, 4), gaussian(30, 384, torch.bfloat16, 6) * 100))
    scheme = scheme_of(name, module_of(x[:16])).activation
    assert scheme is not None
    found = oracle.torchao_inputs(
        x.float().numpy(), scheme.number_format.name, limit_of(scheme), scheme.floor, scheme.block == (0, 0)
    )
    tools, ours = ACTIVATIONS[name].make(x)["expected"], torch.from_numpy(found)
    assert ((ours == tools) | (tools.isnan() & (ours == 0))).all()


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.1], ids=lambda share: f"{share:.1%} outliers")
def test_llm_int8_inputs(share: float, tokens: int) -> None:
    """Codes, scales and outlier columns of bitsandbytes, and the product its MatMul8bitLt makes of them."""
    need("bitsandbytes")
    import bitsandbytes

    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 384, generator=generator).clamp(-5.9, 5.9)
    large = torch.rand(x.shape, generator=generator) < share
    x = torch.where(large, x.sign() * (6 + 50 * torch.rand(x.shape, generator=generator)), x)
    x = x.half().float()  # which the tool rounds inputs to
    scheme = scheme_of("bitsandbytes:type=int8", module_of(x)).activation
    assert scheme is not None
    found, factor = InputTransform(scheme)(x)
    codes, largest, columns = bitsandbytes.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert factor is not None and torch.equal(factor.flatten(), largest / 127)
    outlier = torch.zeros(384, dtype=torch.bool)
    outlier[columns] = True
    assert torch.equal(outlier, large.any(0))
    apart = (found - codes)[:, ~outlier].abs()
    # x * (127 / largest) and x / (largest / 127) may round a tie to either side
    steps = (x / factor)[:, ~outlier]
    assert (apart <= 1).all() and ((steps - steps.trunc()).abs() - 0.5)[apart > 0].abs().lt(1e-4).all()
    assert apart.count_nonzero() <= 1e-3 * codes.numel()
    assert torch.allclose((found * factor)[:, outlier], x[:, outlier], rtol=2e-7, atol=0)

    weight = (torch.randn(64, 384, generator=generator) * 0.02).half()
    stored, row_maxima, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold = stored, row_maxima, 6.0
    state.has_fp16_weights = state.is_training = False
    theirs = bitsandbytes.matmul(x, stored, state=state)
    assert theirs.dtype == torch.float32
    same_ties = torch.where(outlier, found, codes.float())
    ours = (same_ties @ (stored.float() * row_maxima[:, None] * INT8_STEP).T) * factor
    # its constant for 1 / 127^2 is 6.200124e-05, too large by 1.8e-5 of it
    assert (ours - theirs).norm() <= 2e-5 * theirs.norm()
