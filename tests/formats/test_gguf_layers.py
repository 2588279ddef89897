"""GGUF's blocks in safetensors: GPTQModel's own values, rows that are no whole blocks, configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from formats.helpers import FIXTURES, check_values, fixture_cases, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import plan_model

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("gguf_layers")]
CASE = FIXTURES / "gguf_layers/q2_0_mixed"
NAME = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)


def test_the_plan() -> None:
    """Whole rows of blocks stay as they are; others are taken apart, and kernels run both."""
    found = {}
    for name in ("q4_k_m", "q6_k_ragged", "q1_0_ragged", "q2_0_mixed", "q8_0"):
        modules = plan_model(header_of(FIXTURES / "gguf_layers" / name), device="cpu").modules
        found[name] = {m.name.rpartition(".")[2]: f"{m.scheme} {m.kernel}" for m in modules}
    assert found["q4_k_m"]["k_proj"] == "q4_k cpu_blocks"
    assert found["q4_k_m"]["down_proj"] == "uint4 1xall f32 offset cpu_blocks"
    assert found["q6_k_ragged"]["down_proj"] == "int6 1x16 f32 cpu_blocks"
    assert found["q1_0_ragged"]["down_proj"] == "binary 1xall f32 cpu_blocks"
    assert found["q2_0_mixed"]["k_proj"] == "uint2 1xall f16 asym cpu_blocks"
    assert found["q2_0_mixed"]["v_proj"] == "q4_0 cpu_blocks"
    assert found["q8_0"]["k_proj"] == "q8_0 cpu_blocks"
    assert reader_of(CASE).describe() == "GGUF blocks in safetensors, Q2_0 in config.json"


@pytest.mark.parametrize(
    ("bits", "named", "kind"),
    [
        (4, "q_k_s", "gguf_q4_k"),
        (4, None, "gguf_q4_0"),
        (4, "gguf", "gguf_q4_0"),
        (5, None, "gguf_q5_k"),
        ("q5_k_s", None, "gguf_q5_k"),
        ("Q8-0", "q_0", "gguf_q8_0"),
        (1, "q_0_g128", "gguf_q1_0"),
        (3, None, ""),
        (4, "q_1", ""),
        (True, "q_0", ""),
        ("iq2_xs", None, ""),
    ],
)
def test_names_of_types(bits: object, named: str | None, kind: str, tmp_path: Path) -> None:
    config = {"quant_method": "gguf", "bits": bits, "format": named}
    folder = write_folder(tmp_path / "m", {f"{NAME}.qweight": torch.zeros(2, 9216).byte()}, config)
    if not kind:
        with pytest.raises(LowbitError, match="name no type of GGUF's") as caught:
            reader_of(folder)
        assert caught.value.code == "E0212"
        return
    reader = reader_of(folder)
    assert reader.kind == kind  # type: ignore[attr-defined]


def test_another_type_than_the_config_says(tmp_path: Path) -> None:
    seed = Seed.of(CASE)
    config = json.loads(json.dumps(seed.config))
    config["quantization_config"]["dynamic"] = {}
    folder = seed.write(tmp_path, config, seed.tensors)
    name = NAME.replace("k_proj", "v_proj")
    with pytest.raises(LowbitError, match=r"a layer of GGUF blocks \(Q2_0\)") as caught:
        read(folder, name, (32, 64))
    assert caught.value.code == "E0213"
    stack = StoredModule("x.experts.down_proj", "x.experts", (4, 64), expert=0, experts=2)
    with pytest.raises(LowbitError, match="stacked experts"):
        reader_of(folder)._scheme(stack)  # type: ignore[attr-defined]
