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
from lowbit.loading.convert import convert

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


def logits(folder: Path, **more: object) -> Tensor:
    """Of a fixed prompt, in float32."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **more
    )
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
