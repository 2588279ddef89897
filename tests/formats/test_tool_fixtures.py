"""Files that GPTQ's, AWQ's, AutoRound's, FP8's and SGLang's tools saved, against the tools' own values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from formats.helpers import FIXTURES, expected, fixture_cases, last_bit, read, reader_of
from lowbit.formats import StoredModule

CASES = [
    pytest.param(folder, id=f"{folder.parent.name}-{folder.name}")
    for name in ("gptq", "awq", "auto_round", "fp8", "sglang", "w4afp8")
    for folder in fixture_cases(name)
]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    """Equal after casting to the type the tool computes in, or within a last bit of it."""
    for name, values in expected(folder).items():
        shape = (values.shape[0], values.shape[1])
        found = read(folder, name, shape).weight
        assert (
            found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, shape))
            or found.zeros is None
        )
        mine = found.dequantize()
        step = (
            last_bit(values.dtype, values.float())
            if values.dtype != torch.float32
            else 2.0**-22 * values.abs()
        )
        if found.offsets:  # the file holds -(scale * zero) rounded to its own type
            [offset] = found.offsets
            group = shape[1] // offset.shape[1]
            step = step + last_bit(values.dtype, offset.float()).repeat_interleave(group, 1) / 2
        assert ((mine - values.float()).abs() <= step).all(), f"{name}: {found.scheme}"


def test_auto_rounds_own_inputs() -> None:
    """MX: an exponent is that of the largest |x|, where compressed-tensors may count it as the next."""
    name = "model.layers.0.mlp.down_proj"
    own, other = (
        read(FIXTURES / folder, name, (64, columns)).weight.scheme
        for folder, columns in (("auto_round/mxfp4", 96), ("compressed_tensors/mxfp4", 64))
    )
    assert own.activation is not None and other.activation is not None
    assert own.activation == replace(other.activation, round_up=0.0) and other.activation.round_up > 0
    assert reader_of(FIXTURES / "auto_round/mxfp4").scheme_of(StoredModule(name, name, (64, 96))) == own


def test_auto_rounds_static_fp8() -> None:
    module, shape = "model.layers.0.mlp.down_proj", (32, 96)
    found = read(FIXTURES / "auto_round/fp8_static", module, shape, strict=True)
    assert str(found.weight.scheme) == "e4m3 1xall bf16 (input e4m3 allxall static)"
    assert found.input is not None and found.input.static_scale is not None
