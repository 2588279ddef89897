"""Each data-free method against the tool itself, where it is installed: larger weights, cut in many slices.

The tools: torchao 0.18, bitsandbytes 0.50, hqq 0.2.8, compressed-tensors 0.20, transformers 5.23,
nvidia-modelopt 0.47, all on a CPU. The golden files say the same of small weights without any of them.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from torch import Tensor

from lowbit.kernels.activation_quant import limit_of
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
