"""What readers of modules that are packed one by one say of a stack of experts."""

from __future__ import annotations

import pytest

from formats.helpers import fixture_cases, header_of, reader_of
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule

PACKED = {
    "aqlm": "codebooks",
    "awq": "qweight",
    "eetq": "weight_scales",
    "exl2": "q_weight",
    "exl3": "trellis",
    "gptq": "qweight",
    "higgs": "tables2",
    "hqq": "W_q",
    "qserve": "qweight",
    "quip_sharp": "Qidxs",
    "sinq": "W_q",
    "spqr": "dense_weights",
}


@pytest.mark.parametrize("name", PACKED)
def test_stacks_of_packed_experts_are_refused_with_the_way_out(name: str) -> None:
    folder = fixture_cases(name)[0]
    reader = reader_of(folder)
    packed = [
        tensor.removesuffix(f".{PACKED[name]}")
        for tensor in header_of(folder).tensors
        if tensor.endswith(f".{PACKED[name]}") and "qkv" not in tensor
    ]
    module = StoredModule("the experts", packed[0], (64, 64), expert=1, experts=2, dotted=True)
    with pytest.raises(
        LowbitError, match="the experts: stacked experts in .* a module for each expert"
    ) as caught:
        reader.scheme_of(module)
    assert caught.value.code == "E0218"
