"""SqueezeLLM: the tool's kernels, the layout in numpy, its own files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, check_values, fixture_cases, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint.hub import Reference, needed_files
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

NAME = "model.layers.0.mlp.up_proj"
OUT, COLUMNS = 48, 96
CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("squeezellm")]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_kernels(folder: Path) -> None:
    check_values(folder)


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers(folder: Path) -> None:
    """All tensors have a use; what it costs is said."""
    plan = plan_model(header_of(folder), device="cpu", strict=True)
    assert {(module.kernel, str(module.scheme)) for module in plan.modules} == {("cpu_dense", "f16")}
    bits = 3 if "w3" in folder.name else 4
    assert reader_of(folder).describe() == (
        f"squeezellm, {bits}-bit tables of rows in quant_config.json, decoded to 16 bits a weight when loaded"
    )
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


def test_the_doctor_reads_them() -> None:
    for folder in fixture_cases("squeezellm"):
        assert all(finding.severity == "note" for finding in examine(folder).report.findings)


def module(bits: int, sparse: bool, full: bool) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of one module, and the weight they mean as float16."""
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 2**bits, (OUT, COLUMNS))
    tables = rng.normal(0, 0.1, (OUT, 2**bits)).astype(np.float32)
    weight = np.take_along_axis(tables, codes, 1)
    words = np.zeros((COLUMNS * bits // 32, OUT), np.uint64)
    for row in range(OUT):
        for column in range(COLUMNS):
            word, shift = divmod(column * bits, 32)
            low = int(codes[row, column]) << shift
            words[word, row] |= np.uint64(low & 0xFFFFFFFF)
            if low >> 32:
                words[word + 1, row] |= np.uint64(low >> 32)
    tensors = {
        f"{NAME}.qweight": torch.from_numpy(words.astype(np.uint32).view(np.int32)),
        f"{NAME}.lookup_table": torch.from_numpy(tables),
    }
    if sparse:
        counts = rng.integers(0, 4, OUT)
        counts[3] = 0
        columns = np.concatenate([rng.choice(COLUMNS, count, replace=False) for count in counts])
        values = rng.normal(0, 3, len(columns)).astype(np.float32)
        weight[np.arange(OUT).repeat(counts), columns] += values
        starts = np.concatenate(([0], counts.cumsum()))
        tensors |= {
            f"{NAME}.rows": torch.from_numpy(starts.astype(np.int32)),
            f"{NAME}.cols": torch.from_numpy(columns.astype(np.int32)),
            f"{NAME}.vals": torch.from_numpy(values),
        }
    if full:
        lines = rng.normal(0, 1, (COLUMNS, 2)).astype(np.float32)
        weight[[7, 2]] += lines.T
        tensors[f"{NAME}.full_rows"] = torch.from_numpy(lines)
        tensors[f"{NAME}.full_row_indices"] = torch.tensor([7, 2], dtype=torch.int32)
    return tensors, weight.astype(np.float16)


VLLM = {"quant_method": "squeezellm", "wbits": 4}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("sparse", "full"), [(False, False), (True, False), (True, True), (False, True)])
def test_values(bits: int, sparse: bool, full: bool, tmp_path: Path) -> None:
    tensors, weight = module(bits, sparse, full)
    for number, config in enumerate((None, VLLM | {"wbits": bits}, {"quant_method": "squeezellm"})):
        folder = write_folder(tmp_path / str(number), tensors, config)
        found = read(folder, NAME, (OUT, COLUMNS), strict=True).weight
        assert str(found.scheme) == "f16"
        assert np.array_equal(found.dequantize().numpy(), weight.astype(np.float32))


def test_tables_in_bfloat16(tmp_path: Path) -> None:
    tensors, _ = module(4, False, False)
    table = tensors[f"{NAME}.lookup_table"].bfloat16()
    folder = write_folder(tmp_path, tensors | {f"{NAME}.lookup_table": table}, VLLM)
    found = read(folder, NAME, (OUT, COLUMNS)).weight
    assert str(found.scheme) == "bf16" and set(found.codes[5].tolist()) <= set(table[5].tolist())


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_file(folder: Path, tmp_path: Path) -> None:
    """A pickle of its own name, with counts between the tensors."""
    tensors = load_file(folder / "model.safetensors")
    rows = [name for name in tensors if name.endswith(".rows")]
    counts = {f"sparse_threshold.{name.removesuffix('.rows')}": 165 for name in rows}
    torch.save(tensors | counts, tmp_path / "sq-tiny-w4.pt")
    for name in ("config.json", "quant_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    plan = plan_model(header_of(tmp_path), strict=True)
    assert plan.format == "squeezellm"
    stem, shape = "model.layers.0.self_attn.k_proj", (128, 128)
    a, b = (read(where, stem, shape).weight.codes for where in (folder, tmp_path))
    assert torch.equal(a, b)


def test_the_tools_own_file_on_the_hub() -> None:
    names = ["config.json", "quant_config.json", "sq-llama-7b-w4-s0.pt", "optimizer.pt"]
    assert needed_files(Reference("a/b"), names) == names[:3]
    with pytest.raises(LowbitError):
        needed_files(Reference("a/b"), [*names, "sq-llama-7b-w3-s0.pt"])


def test_qserves_file_of_the_same_name(tmp_path: Path) -> None:
    """It says wbits too; tables are SqueezeLLM's."""
    folder = write_folder(tmp_path, module(4, False, False)[0], None)
    (folder / "quant_config.json").write_text(json.dumps({"wbits": 4}))
    assert "squeezellm" in reader_of(folder).describe()
    qserve = next((FIXTURES / "qserve").glob("*/model.safetensors")).parent
    assert reader_of(qserve).name == "qoq"


DAMAGE = [
    ({"qweight": torch.zeros(12, OUT, dtype=torch.int16)}, "E0213"),
    ({"qweight": torch.zeros(9, OUT, dtype=torch.int32)}, "E0213"),
    ({"qweight": None}, "E0209"),
    ({"lookup_table": torch.zeros(OUT, 8)}, "E0213"),
    ({"lookup_table": torch.zeros(OUT, 15)}, "E0213"),
    ({"lookup_table": torch.full((OUT, 16), float("nan"))}, "E0215"),
    ({"lookup_table": torch.full((OUT, 16), 1e6)}, "E0215"),
    ({"rows": torch.zeros(OUT, dtype=torch.int32)}, "E0213"),
    ({"rows": torch.zeros(OUT + 1, dtype=torch.int32)}, "E0213"),
    ({"rows": None}, "E0209"),
    ({"cols": torch.zeros(3, dtype=torch.int32)}, "E0213"),
    ({"cols": None}, "E0209"),
    ({"vals": None}, "E0209"),
    ({"full_rows": None}, "E0209"),
    ({"full_rows": torch.zeros(COLUMNS, 3)}, "E0213"),
    ({"full_rows": torch.zeros(2, COLUMNS)}, "E0213"),
    ({"full_row_indices": torch.tensor([0, OUT], dtype=torch.int32)}, "E0213"),
    ({"full_row_indices": torch.tensor([-1, 0], dtype=torch.int32)}, "E0213"),
    ({"full_row_indices": None}, "E0209"),
]


@pytest.mark.parametrize(("change", "code"), DAMAGE)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, _ = module(4, True, True)
    for suffix, value in change.items():
        tensors.pop(f"{NAME}.{suffix}")
        if value is not None:
            tensors[f"{NAME}.{suffix}"] = value
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, VLLM), NAME, (OUT, COLUMNS))
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "at", "value"), [("cols", 0, COLUMNS), ("cols", 2, -1), ("rows", 3, 10**6)]
)
def test_places_of_outliers(suffix: str, at: int, value: int, tmp_path: Path) -> None:
    tensors, _ = module(4, True, False)
    tensors[f"{NAME}.{suffix}"][at] = value
    with pytest.raises(LowbitError, match="the file is damaged") as caught:
        read(write_folder(tmp_path, tensors, VLLM), NAME, (OUT, COLUMNS))
    assert caught.value.code == "E0213"


@pytest.mark.parametrize("bits", [2, 8, "4", 4.0, True])
def test_configs_that_cannot_be(bits: object, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        reader_of(write_folder(tmp_path, module(4, False, False)[0], VLLM | {"wbits": bits}))
    assert caught.value.code == "E0212"


def test_columns_that_do_not_fill_words(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="packs multiples of 32"):
        read(write_folder(tmp_path, module(4, False, False)[0], VLLM), NAME, (OUT, 80))
