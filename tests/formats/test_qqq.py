"""QQQ: GPTQModel's own packing, the layout weight by weight, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import check_values, fixture_cases, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model, plan_model

NAME = "model.layers.0.mlp.up_proj"
OUT = 128
CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("qqq")]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_on_native_kernels(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu", strict=True)
    quantized = {module.name: module for module in plan.modules if not module.scheme.is_dense}
    assert len(quantized) == 7 and {one.kernel for one in quantized.values()} == {"cpu_blocks"}
    schemes = {name.rpartition(".")[2]: str(one.scheme) for name, one in quantized.items()}
    assert all(scheme.endswith("(input int8 1xall dynamic)") for scheme in schemes.values())
    assert schemes["o_proj"].startswith("int4 1xall f32")  # 128 columns: never grouped
    grouped = schemes["k_proj"].startswith("int4 1x128 f16 1xall f32")
    assert grouped == (folder.name == "g128")
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


@pytest.mark.parametrize("folder", CASES)
def test_every_tensor_has_a_use(folder: Path) -> None:
    """One of no elements too: the tool drops all but one of them."""
    header = header_of(folder)
    for module in plan_model(header).modules:
        used = set(reader_of(folder).tensors_of(StoredModule(module.name, module.name, module.shape)))
        assert used == {name for name in header.tensors if name.startswith(f"{module.name}.")}
    assert (0,) in {entry.shape for name, entry in header.tensors.items() if name.endswith(".s_group")}


def test_the_doctor_reads_them() -> None:
    for folder in fixture_cases("qqq"):
        assert all(finding.severity == "note" for finding in examine(folder).report.findings)


def place(row: int, column: int, grouped: bool) -> tuple[int, int, int]:
    """(line, word, nibble) of a weight: a lane of the product m16n8k16 holds four columns of one row."""
    line, tile, lane = column // 16, row // 64, (row % 8) * 4 + column % 16 // 4
    half, in_lane, part = row % 16 // 8, column % 4, row % 64 // 16
    code = half * 4 + in_lane  # of the eight of a word
    nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(code) if grouped else [4, 0, 5, 1, 6, 2, 7, 3].index(code)
    return line, tile * 128 + lane * 4 + part, nibble


def module(grouped: bool, columns: int = 256) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of one module, and the weight they mean."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (OUT, columns))
    words = np.zeros((columns // 16, OUT * 2), np.uint32)
    for row in range(OUT):
        for column in range(columns):
            line, word, nibble = place(row, column, grouped)
            words[line, word] |= np.uint32(codes[row, column] << 4 * nibble)
    channel = rng.uniform(1e-4, 0.02, OUT).astype(np.float32)
    order = [
        32 * run + 2 * (i // 8) + (i % 2) + i % 8 // 2 * 8 for run in range(OUT // 32) for i in range(32)
    ]
    tensors = {
        f"{NAME}.B": torch.from_numpy(words.view(np.int32)),
        f"{NAME}.s_channel": torch.from_numpy(channel[order][None].copy()),
    }
    if not grouped:
        signed = np.where(codes > 7, codes - 16, codes)
        return tensors, signed.astype(np.float32) * (16 * channel)[:, None]
    inner = rng.uniform(1, 16, (OUT, columns // 128)).astype(np.float16)
    rows = [64 * run + i // 8 + i % 8 * 8 for run in range(OUT // 64) for i in range(64)]
    tensors[f"{NAME}.s_group"] = torch.from_numpy(inner[rows].T.copy())
    scale = inner.astype(np.float32).repeat(128, 1) * channel[:, None]
    return tensors, (codes - 8).astype(np.float32) * scale


def config(group: int = 128, **more: object) -> dict[str, object]:
    """As QQQ's own tool has it."""
    return {"quant_method": "qqq", "wbits": 4, "group_size": group, **more}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("columns", [128, 256, 384])
def test_values(grouped: bool, columns: int, tmp_path: Path) -> None:
    """A row of one group has none."""
    tensors, weight = module(grouped and columns > 128, columns)
    folder = write_folder(tmp_path, tensors, config(128 if grouped else -1))
    found = read(folder, NAME, (OUT, columns), strict=True).weight
    assert np.array_equal(found.dequantize().numpy(), weight)
    told = "qqq, 4-bit group 128, int8 inputs" if grouped else "qqq, 4-bit per channel, int8 inputs"
    assert reader_of(folder).describe() == f"{told} in config.json"


def test_dynamic_rules(tmp_path: Path) -> None:
    tensors, weight = module(False)
    rules = {r"-:.*\.o_proj": {}, r"+:.*\.down_proj": {}, r".*\.up_proj$": {"group_size": -1}}
    folder = write_folder(tmp_path / "a", tensors, config(128, dynamic=rules))
    assert np.array_equal(read(folder, NAME, (OUT, 256)).weight.dequantize().numpy(), weight)
    rules = {r".*\.up_proj$": {"bits": 8}}
    with pytest.raises(LowbitError, match="dynamic: bits must be 4 for qqq, found 8") as caught:
        reader_of(write_folder(tmp_path / "b", tensors, config(128, dynamic=rules)))
    assert caught.value.code == "E0212"


@pytest.mark.parametrize(
    "change",
    [{"wbits": 8}, {"bits": 3}, {"sym": False}, {"desc_act": True}, {"group_size": 64}, {"group_size": None},
     {"group_size": "x"}, {"group_size": True}, {"dynamic": ["x"]}, {"wbits": True}],
    ids=str,
)  # fmt: skip
def test_configs_that_cannot_be(change: dict, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        reader_of(write_folder(tmp_path, module(True)[0], config() | change))
    assert caught.value.code == "E0212"


DAMAGE = [
    ({"B": torch.zeros(16, OUT, dtype=torch.int32)}, "E0213"),
    ({"B": torch.zeros(16, OUT * 2)}, "E0213"),
    ({"s_channel": torch.ones(OUT)}, "E0213"),
    ({"s_channel": torch.ones(1, OUT).half()}, "E0213"),
    ({"s_channel": torch.full((1, OUT), float("nan"))}, "E0215"),
    ({"s_channel": None}, "E0209"),
    ({"s_group": torch.ones(1, OUT).half()}, "E0213"),
    ({"s_group": torch.zeros(0).half()}, "E0213"),
    ({"s_group": torch.full((2, OUT), float("inf")).half()}, "E0215"),
    ({"s_group": None}, "E0209"),
]


@pytest.mark.parametrize(("change", "code"), DAMAGE)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, _ = module(True)
    for suffix, value in change.items():
        tensors.pop(f"{NAME}.{suffix}")
        if value is not None:
            tensors[f"{NAME}.{suffix}"] = value
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, config()), NAME, (OUT, 256))
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)


def test_groups_where_the_config_has_none(tmp_path: Path) -> None:
    """The codes' order would be the other one."""
    with pytest.raises(LowbitError, match=r"s_group.* stores \[0\]"):
        read(write_folder(tmp_path, module(True)[0], config(-1)), NAME, (OUT, 256))


@pytest.mark.parametrize("shape", [(OUT, 192), (96, 256), (OUT, 264)])
def test_sizes_it_does_not_pack(shape: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="QQQ packs multiples of 64 x 128"):
        read(write_folder(tmp_path, module(True)[0], config()), NAME, shape)


def test_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="the weights are qqq's") as caught:
        reader_of(write_folder(tmp_path, module(True)[0], None))
    assert caught.value.code == "E0211"
