"""Files that GPTQ's, AWQ's, AutoRound's, FP8's and SGLang's tools saved, against the tools' own values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.helpers import expected, fixture_cases, last_bit, read, reader_of
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
