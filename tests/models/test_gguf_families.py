"""Every family from GGUF files that llama.cpp's converter wrote, against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    expected = load_file(FOLDER / f"{name}.safetensors")
    model = load_model(open_checkpoint(str(FOLDER / f"{name}.gguf")), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [expected["tokens"].flatten().tolist()])
    wanted = expected["logits"].view(logits.shape)
    worst = ((logits - wanted).abs().amax(1) / wanted.abs().amax(1)).max()
    # Quantized weights meet inputs rounded to bfloat16 in the native kernels.
    assert worst <= (1e-3 if model.kernels == {"cpu_dense"} else 3e-2), f"{name}: {worst:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_on_torch_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    expected = load_file(FOLDER / f"{name}.safetensors")
    model = load_model(open_checkpoint(str(FOLDER / f"{name}.gguf")), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [expected["tokens"].flatten().tolist()])
    wanted = expected["logits"].view(logits.shape)
    worst = ((logits - wanted).abs().amax(1) / wanted.abs().amax(1)).max()
    assert worst <= 1e-3, f"{name}: {worst:.2e}"


def test_plan_counts_experts() -> None:
    plan = plan_model(open_checkpoint(str(FOLDER / "mixtral.gguf")))
    assert sum(".experts." in module.name for module in plan.modules) == 2 * 4 * 3


MIXED = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "Q5_1", "F16", "Q4_1", "Q5_0")]


@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_in_split_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix in another type and spread over several files, against their floats in one file."""
    reader = gguf.GGUFReader(FOLDER / f"{name}.gguf")
    arch = reader.fields["general.architecture"].contents()
    split = gguf.GGUFWriter(tmp_path / "split.gguf", arch, split_max_tensors=len(reader.tensors) // 3 + 1)
    plain = gguf.GGUFWriter(tmp_path / "plain.gguf", arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            for writer in (split, plain):
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for number, tensor in enumerate(reader.tensors):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(".weight") and values.ndim > 1 and values.shape[-1] % 32 == 0:
            kind = MIXED[number % len(MIXED)]
            stored = gguf.quants.quantize(values, kind)
            split.add_tensor(tensor.name, stored, raw_dtype=kind)
            values = gguf.quants.dequantize(stored, kind)
        else:
            split.add_tensor(tensor.name, values)
        plain.add_tensor(tensor.name, values)
    for writer in (split, plain):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    [first, *rest] = sorted(tmp_path.glob("split-*.gguf"))
    assert rest
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    tokens = load_file(FOLDER / f"{name}.safetensors")["tokens"].flatten().tolist()
    found, wanted = (
        prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [tokens])[0]
        for path in (first, tmp_path / "plain.gguf")
    )
    assert not torch.equal(wanted, torch.zeros_like(wanted))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
