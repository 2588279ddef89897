"""Each data-free method against what the tool itself made of the same cruel weight, bit by bit.

The files are the tools' own output (see fixtures/quantize/make_quantized.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.kernels.activation_quant import limit_of
from oracles import quantizers as oracle
from quantize.helpers import agrees, module_of, scheme_of
from quantize.tools import TOOLS

FOLDER = Path(__file__).parents[1] / "fixtures" / "quantize"
CASES = [f"{tool}/{name}" for tool, cases in TOOLS.items() for name in cases]


def load(case: str) -> tuple[str, dict[str, Tensor]]:
    """The method and the tensors of a file."""
    with safe_open(FOLDER / f"{case}.safetensors", "pt") as file:
        names = list(file.keys())
        return file.metadata()["method"], {name: file.get_tensor(name) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_the_tools_own_weight(case: str) -> None:
    method, stored = load(case)
    agrees(case, method, stored)


@pytest.mark.parametrize("name", ["int8dq", "fp8dq-per_row", "fp8dq-per_tensor"])
def test_torchao_inputs(name: str) -> None:
    """The method's activation scheme, read by numpy, gives what torchao made of the same x."""
    method, stored = load(f"torchao/activation_{name}")
    x, scheme = stored["weight"], scheme_of(method, module_of(stored["weight"])).activation
    assert scheme is not None and (scheme.mode, scheme.input) == ("dynamic", "bf16")
    found = oracle.torchao_inputs(
        x.float().numpy(), scheme.number_format.name, limit_of(scheme), scheme.floor, scheme.block == (0, 0)
    )
    tools, ours = stored["expected"], torch.from_numpy(found)
    assert ((ours == tools) | (tools.isnan() & (ours == 0))).all()


def test_every_file_is_a_case() -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.safetensors")}
    assert {name for name in files if "activation_" not in name} == set(CASES)
    assert max(path.stat().st_size for path in FOLDER.glob("*/*.safetensors")) <= 60_000
