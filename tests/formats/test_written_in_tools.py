"""Written checkpoints in the tools that own their formats: transformers with each format's own package.

Slow, and skipped where a package is not installed. Not here: what transformers 5.23 with compressed-tensors
0.20 cannot load from its own files either (packed zero points; mxfp4, nvfp4 and blocks of models this small);
their numbers are compared by the package's compressors in test_compressed_tensors_writer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.helpers import FIXTURES
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel

pytestmark = pytest.mark.slow

# (fixture, format it is written in, package that reads it)
CASES = [
    ("gptq/w4_sym", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/two_groups", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/w8a8_dynamic", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/w8a8_static_asym", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/fp8_channel_dynamic", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/fp8_tensor_static", "compressed-tensors", "compressed_tensors"),
    ("compressed_tensors/w8a16_channel", "compressed-tensors", "compressed_tensors"),
    ("bitsandbytes/nf4", "bitsandbytes", "bitsandbytes"),
    ("bitsandbytes/nf4_double", "bitsandbytes", "bitsandbytes"),
    ("bitsandbytes/int8", "bitsandbytes", "bitsandbytes"),
    ("gptq/w4_sym", "gptq", "gptqmodel"),
    ("gptq/w4_asym_actorder", "gptq", "gptqmodel"),
    ("awq/gemm", "awq", "gptqmodel"),
]


def logits(folder: Path, dtype: torch.dtype = torch.float32, **more: object) -> Tensor:
    """Of a fixed prompt, in float32."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **more)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits.float()


@pytest.mark.parametrize(("name", "form", "package"), CASES, ids=lambda value: str(value).replace("/", "-"))
def test_logits(name: str, form: str, package: str, tmp_path: Path) -> None:
    """The written checkpoint against the tool's own, if it is of the format, or the plain one.

    (Static scales of inputs that these models never see make them differ from their own plain numbers.)
    """
    pytest.importorskip(package, reason=f"{package} is not installed")
    if form == "gptq":
        pytest.importorskip(
            "optimum", reason="optimum, through which transformers reads gptq, is not installed"
        )
    header = open_checkpoint(str(FIXTURES / name))
    convert(header, form, tmp_path / "written")
    found = logits(tmp_path / "written")
    if name.startswith(form.replace("-", "_")):
        assert torch.equal(found, logits(FIXTURES / name))
        if "static" in name:
            return
    convert(header, "dense", tmp_path / "dense")
    wanted = logits(tmp_path / "dense")
    # Some tools compute in 16 bits, or quantize inputs as the scheme says.
    assert (found - wanted).abs().max() <= 0.06 * wanted.abs().max()
    assert torch.nn.functional.cosine_similarity(found, wanted, -1).min() > 0.995


@pytest.mark.parametrize("name", ["fp8/block_128", "fp8/block_32_ue8m0", "fp8/tensor_static", "fp8/mxfp8"])
def test_fp8_in_transformers(name: str, tmp_path: Path) -> None:
    """Its own dequantizer gives what it gives for its own file."""
    from transformers import FineGrainedFP8Config

    convert(open_checkpoint(str(FIXTURES / name)), "fp8", tmp_path / "written")
    told = {"dtype": torch.bfloat16, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    assert torch.equal(logits(tmp_path / "written", **told), logits(FIXTURES / name, **told))


def test_mxfp4_in_transformers(tmp_path: Path) -> None:
    """gpt-oss, its experts unpacked by transformers."""
    from transformers import Mxfp4Config

    folder = FIXTURES / "mxfp4" / "gpt_oss"
    convert(open_checkpoint(str(folder)), "mxfp4", tmp_path / "written")
    plain = Mxfp4Config(dequantize=True)
    found = logits(tmp_path / "written", quantization_config=plain)
    assert torch.equal(found, logits(folder, quantization_config=plain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fbgemm's layers need a GPU")
def test_fp8_a_row_in_transformers(tmp_path: Path) -> None:
    """FP8 with scales a row, as fbgemm_fp8, beside the plain model."""
    pytest.importorskip("fbgemm_gpu", reason="fbgemm_gpu is not installed")
    header = open_checkpoint(str(FIXTURES / "compressed_tensors" / "fp8_channel_dynamic"))
    convert(header, "fp8", tmp_path / "written")
    convert(header, "dense", tmp_path / "dense")
    found = logits(tmp_path / "written", device_map="cuda")
    assert torch.nn.functional.cosine_similarity(found, logits(tmp_path / "dense"), -1).min() > 0.995


@pytest.mark.parametrize(
    "name",
    [
        "compressed_tensors/fp8_tensor_static",
        "compressed_tensors/fp8_channel_dynamic",
        "auto_round/nvfp4",
        "modelopt/nvfp4",
        "modelopt/mxfp8",
        "modelopt/w4a8_mxfp4_fp8",
        "modelopt/int8_sq",
    ],
)
def test_modelopt_s_own_tensors(name: str, tmp_path: Path) -> None:
    """ModelOpt loads no exported checkpoint; its quantized tensors dequantize what is written."""
    pytest.importorskip("modelopt.torch", reason="nvidia-modelopt is not installed")
    import sys

    from safetensors.torch import load_file

    sys.path += [str(FIXTURES / "modelopt"), str(FIXTURES / "making")]
    from make_modelopt import dequantized

    header = open_checkpoint(str(FIXTURES / name))
    convert(header, "modelopt", tmp_path / "out")
    source, tensors = SourceModel(header), load_file(tmp_path / "out" / "model.safetensors")
    with TensorData(header) as data:
        for module in source.modules:
            if not module.scheme.is_dense:
                exact = source.read(module, data).weight.dequantize()
                assert torch.equal(dequantized(tensors, module.target.stored), exact), module.target.name


def test_gguf_in_transformers(tmp_path: Path) -> None:
    """transformers reads GGUF files of Llama: the weights it had before."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    from transformers import AutoModelForCausalLM

    convert(open_checkpoint("smollm2"), "dense", tmp_path / "dense")
    convert(open_checkpoint(str(tmp_path / "dense")), "gguf", tmp_path / "model.gguf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    theirs = dict(found.named_parameters())
    for name, values in wanted.named_parameters():
        assert torch.equal(theirs[name], values), name


@pytest.mark.parametrize(
    "name",
    ["mlx/4_g64", "mlx/mixed", "mlx/nvfp4", "mlx/mxfp8", "gptq/w4_sym", "awq/gemm"],
    ids=lambda name: name,
)
def test_mlx(name: str, tmp_path: Path) -> None:
    """mlx-lm's logits of what was written: those of its own file, or about the plain numbers' in float32."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    mx.set_default_device(mx.cpu)

    def theirs(folder: Path) -> Tensor:
        config = json.loads((folder / "config.json").read_text())
        theta = {"rope_theta": config["rope_parameters"]["rope_theta"]}  # transformers 4's name for it
        model, _ = utils.load_model(folder, model_config=theta)
        tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
        return torch.tensor(model(tokens).astype(mx.float32).tolist())

    header = open_checkpoint(str(FIXTURES / name))
    convert(header, "mlx", tmp_path / "written")
    found = theirs(tmp_path / "written")
    if name.startswith("mlx"):
        assert torch.equal(found, theirs(FIXTURES / name))
        return
    convert(header, "dense", tmp_path / "plain")
    wanted = logits(tmp_path / "plain")
    assert (found - wanted).abs().max() <= 0.06 * wanted.abs().max()
    assert torch.nn.functional.cosine_similarity(found, wanted, -1).min() > 0.995
