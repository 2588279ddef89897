"""Whole mixtures of experts on the device's kernels beside transformers: nothing runs one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forward_helpers import prompt_logits
from loading.test_tensor_parallel import random_experts
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.experts import GpuGroupedExperts
from lowbit.layers.experts import Experts
from lowbit.layers.mlp import MixtureOfExperts
from lowbit.loading import load_model
from models import test_quantized_experts as moe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cache of the test helpers is on a CPU")

TOKENS = moe.TOKENS[:4]


def one_by_one(*_: object) -> Tensor:
    raise AssertionError("experts ran one by one")


def differences(
    folder: Path, model: moe.transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Each token's largest difference of logits, of its largest logit."""
    monkeypatch.setattr(Experts, "one_by_one", one_by_one)
    loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
    mixtures = [block.mlp for block in loaded.blocks if isinstance(block.mlp, MixtureOfExperts)]
    assert mixtures and all(isinstance(mixture.experts.grouped, GpuGroupedExperts) for mixture in mixtures)
    [logits] = prompt_logits(loaded, [TOKENS])
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    return (logits - wanted).abs().amax(1) / wanted.abs().amax(1)


@pytest.mark.slow
def test_mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe.made("Mixtral")
    folder = moe.write(tmp_path, model, moe.per_expert(model), None)
    assert differences(folder, model, monkeypatch).max() <= 1e-3


QUANTIZED = [
    ("Qwen3Moe", "gptq"),
    pytest.param("Glm4Moe", "fp8", marks=pytest.mark.slow),
    pytest.param("Qwen2Moe", "w8a8_int8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "fmt"), QUANTIZED)
def test_quantized(name: str, fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, config = moe.FORMATS[fmt]
    model = moe.made(name)
    folder = moe.write(tmp_path, model, moe.quantize_experts(model, quantize), config)
    found = differences(folder, model, monkeypatch)
    # gptq: inputs may be rounded to bfloat16; the others quantize them, which may tip a router
    assert found.max() <= 0.03 if fmt == "gptq" else found.median() <= 0.1


def test_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up in turn, biases, an activation of its own."""
    model = moe.made("GptOss")
    tensors = moe.gpt_oss_one_by_one(model, *moe.GPT_OSS["gptqmodel"])
    assert differences(moe.write(tmp_path, model, tensors, None), model, monkeypatch).max() <= 1e-3


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize(("hidden", "inner"), [(128, 128), (160, 96)])
def test_trellises(hidden: int, inner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXL3's experts: gate, up and down each a trellis of random bits, beside the CPU's kernel."""
    monkeypatch.setattr(moe, "SIZES", moe.SIZES | {"hidden_size": hidden, "num_hidden_layers": 1})
    monkeypatch.setattr(moe, "INNER", inner)
    model, draw = moe.made("Qwen3Moe"), torch.Generator().manual_seed(3)

    def scales(size: int) -> Tensor:
        return torch.randn(size, generator=draw).half() * 0.3

    def trellis(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out, columns = (-(-size // 128) * 128 for size in weight.shape)
        words = torch.randint(-(1 << 15), 1 << 15, (columns // 16, out // 16, 48), generator=draw).short()
        multiplier = torch.tensor(0xCBAC1FED, dtype=torch.uint32).view(torch.int32)
        return {"trellis": words, "suh": scales(columns), "svh": scales(out), "mcg": multiplier}, weight

    config = {"quant_method": "exl3", "version": "1.4.1", "bits": 3.0, "head_bits": 16}
    folder = moe.write(tmp_path, model, moe.quantize_experts(model, trellis), config)
    with monkeypatch.context() as patch:
        patch.setattr(Experts, "one_by_one", one_by_one)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert "gpu_trellis" in loaded.kernels
        [found] = prompt_logits(loaded, [TOKENS])
    with monkeypatch.context() as patch:
        patch.setitem(runtime._state, "interpreting", False)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert "cpu_trellis" in loaded.kernels
        [wanted] = prompt_logits(loaded, [TOKENS])
    assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("fmt", ["vptq", "quip_sharp"])
def test_codebooks_and_lattices(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random codes of VPTQ, each expert in an order of its own, and of QuIP#, beside the CPU's kernels."""
    monkeypatch.setattr(moe, "SIZES", moe.SIZES | {"num_hidden_layers": 1})
    folder = random_experts(tmp_path, fmt)
    with monkeypatch.context() as patch:
        patch.setattr(Experts, "one_by_one", one_by_one)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert {"vptq": "gpu_row_vectors", "quip_sharp": "gpu_lattice"}[fmt] in loaded.kernels
        [found] = prompt_logits(loaded, [TOKENS])
    with monkeypatch.context() as patch:
        patch.setitem(runtime._state, "interpreting", False)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert not any(name.startswith("gpu") for name in loaded.kernels)
        [wanted] = prompt_logits(loaded, [TOKENS])
    assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()
