"""Whole mixtures of experts on the device's kernels beside transformers: nothing runs one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forward_helpers import prompt_logits
from loading.test_tensor_parallel import RANDOM, VPTQ_RULE, random_experts, random_vptq
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
SPQR = Path(__file__).parents[1] / "fixtures" / "spqr"


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
@pytest.mark.parametrize("fmt", ["vptq", "vptq_outliers", "quip_sharp"])
def test_codebooks_and_lattices(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random codes of VPTQ, each expert in an order of its own, and of QuIP#, beside the CPU's kernels."""
    monkeypatch.setattr(moe, "SIZES", moe.SIZES | {"num_hidden_layers": 1})
    sizes = {"vector_lens": [4, 8], "num_centroids": [16, 16], "outlier_size": 8, "group_size": 56}
    rules = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), VPTQ_RULE | sizes)
    config = {"quant_method": "vptq", "shared_layer_config": rules}
    monkeypatch.setitem(RANDOM, "vptq_outliers", (vptq_with_outliers, config))
    kernel = "gpu_lattice" if fmt == "quip_sharp" else "gpu_row_vectors"
    beside_the_cpu(random_experts(tmp_path, fmt), kernel, monkeypatch)


def vptq_with_outliers(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """8 columns of vectors of their own, of 4 rows."""
    stored = random_vptq(rows, columns, generator)
    return stored | {
        "indices": random_vptq(rows, columns - 8, generator)["indices"],
        "outlier_centroids.weight": torch.randn(1, 16 * 4, generator=generator).half(),
        "outlier_indices": torch.randint(16, (1, rows // 4, 8), generator=generator).to(torch.int16),
    }


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_spqr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that the tool saved as experts, with more outliers or less, beside the CPU's kernels."""
    monkeypatch.setattr(moe, "SIZES", moe.SIZES | {"num_hidden_layers": 1})
    monkeypatch.setattr(moe, "INNER", 96)
    saved = [load_file(SPQR / name / "model.safetensors") for name in ("csr_act_order", "ptcsr_act_order")]
    tensors = moe.per_expert(model := moe.made("Qwen3Moe"))
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
        expert, layer = int(name.split(".")[-3]), name.split(".")[-2]
        if expert > 1:
            layer = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(layer, layer)
        for suffix in ("dense_weights", "row_offsets", "col_vals", "in_perm"):
            stored = f"model.layers.0.mlp.{layer}.{suffix}"
            tensors[name.replace("weight", suffix)] = saved[expert % 2].get(stored, saved[0][stored]).clone()
    folder = moe.write(
        tmp_path, model, tensors, {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16}
    )
    beside_the_cpu(folder, "gpu_halves", monkeypatch)


def beside_the_cpu(folder: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Experts, "one_by_one", one_by_one)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert kernel in loaded.kernels
        [found] = prompt_logits(loaded, [TOKENS])
    with monkeypatch.context() as patch:
        patch.setitem(runtime._state, "interpreting", False)
        loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
        assert not any(name.startswith("gpu") for name in loaded.kernels)
        [wanted] = prompt_logits(loaded, [TOKENS])
    assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()
