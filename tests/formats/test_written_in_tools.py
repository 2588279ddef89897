"""Written checkpoints in the tools that own their formats: transformers with each format's own package.

Slow, and skipped where a package is not installed. Not here: what transformers 5.23 with compressed-tensors
0.20 cannot load from its own files either (packed zero points; mxfp4, nvfp4 and blocks of models this small);
their numbers are compared by the package's compressors in test_compressed_tensors_writer.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from formats.helpers import FIXTURES
from formats.writing_cases import fixtures_it_takes
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.gptq_writer import AwqWriter, GptqWriter
from lowbit.formats.hqq_writer import HqqWriter
from lowbit.formats.mlx_writer import MlxWriter
from lowbit.formats.writing import CheckpointWriter, all_writers, writer_of
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel
from lowbit.quantize.recipe import Asked

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


def computes_as(written: Path, source: Path) -> None:
    """Let bitsandbytes compute in the type that the source names: the writer names the model's. Where it has
    a kernel of its own (AVX-512) it does not ask.
    """
    config, key = json.loads((written / "config.json").read_text()), "bnb_4bit_compute_dtype"
    told = json.loads((source / "config.json").read_text())["quantization_config"]
    config["quantization_config"][key] = told[key]
    (written / "config.json").write_text(json.dumps(config))


def names(kind: type[CheckpointWriter], *groups: str) -> list[str]:
    """The fixtures that the writer takes, as group/case."""
    return [f"{path.parent.name}/{path.name}" for path in fixtures_it_takes(kind, *groups)]


def written_modules(name: str, form: str, folder: Path) -> dict[str, Tensor]:
    """Write the fixture as ``form``: the exact float32 weight of every quantized module, by its name."""
    header = open_checkpoint(str(FIXTURES / name))
    convert(header, form, folder)
    source = SourceModel(header)
    with TensorData(header) as data:
        quantized = [module for module in source.modules if not module.scheme.is_dense]
        return {m.target.stored: source.read(m, data).weight.dequantize() for m in quantized}


def without_init(package: str) -> ModuleType:
    """The package without what importing it runs, for which some want a GPU or another torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed; its unpacked distribution on PYTHONPATH is enough")
    whole = ModuleType(package)
    whole.__path__, whole.__spec__ = list(spec.submodule_search_locations), spec
    return whole


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
    if form == "bitsandbytes" and name.startswith(form):
        computes_as(tmp_path / "written", FIXTURES / name)
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


def test_int8_with_inputs_in_compressed_tensors(tmp_path: Path) -> None:
    """w8a8_int8 for transformers: its codes and scales, beside compressed-tensors' rule of inputs."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    header = open_checkpoint(str(FIXTURES / "sglang" / "w8a8_int8"))
    convert(header, "compressed-tensors", tmp_path / "written", requantize="")
    convert(header, "dense", tmp_path / "dense")
    found, wanted = logits(tmp_path / "written"), logits(tmp_path / "dense")
    assert not torch.equal(found, wanted), "inputs are rounded to int8"
    assert (found - wanted).abs().max() <= 0.06 * wanted.abs().max()
    assert torch.nn.functional.cosine_similarity(found, wanted, -1).min() > 0.995


@pytest.mark.parametrize("name", names(HqqWriter, "hqq"), ids=lambda name: name.replace("/", "-"))
def test_hqq_in_transformers_4(name: str, tmp_path: Path) -> None:
    """HqqHfQuantizer of transformers 4 makes HQQLinears of the written tensors: the plain model's logits."""
    import transformers

    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 does not load HQQ; version 4's unpacked wheel on PYTHONPATH is enough")
    pytest.importorskip("hqq", reason="hqq is not installed")
    header = open_checkpoint(str(FIXTURES / name))
    convert(header, "hqq", tmp_path / "written")
    convert(header, "dense", tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "written"), logits(tmp_path / "dense"))


@pytest.mark.parametrize("form", sorted(set(all_writers()) - {"gguf", "mxfp4"}))
def test_what_transformers_misreads_is_said(form: str, tmp_path: Path) -> None:
    """A folder that it opens without all of its tensors is one of a format whose writer says so.

    And the other way: where a newer transformers reads the format, what is said must go.
    """
    import transformers

    if form == "hqq":
        pytest.importorskip("hqq", reason="hqq, without which transformers refuses the folder, is not there")
        if transformers.__version__.startswith("4."):
            pytest.skip("transformers 4 loads HQQ")
    kind = writer_of(form)
    folders = {"dense": "gptq"} | dict.fromkeys(("w8a8_int8", "w8a8_fp8", "blockwise_int8"), "sglang")
    fixtures = names(kind, folders.get(form, form.replace("-", "_")))
    assert fixtures
    misread = []
    for name in fixtures:
        out = tmp_path / name.replace("/", "-")
        try:
            notes = convert(open_checkpoint(str(FIXTURES / name)), form, out).notes
        except LowbitError:
            continue  # one scale for another width than the groups'
        said = any("opens the folder all the same" in note for note in notes)
        try:
            _, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        except (ImportError, ValueError, RuntimeError, AttributeError):
            continue  # it says itself that it cannot
        wrong = bool(told["missing_keys"] or told["unexpected_keys"])
        assert wrong == said, f"{name}: {'misread' if wrong else 'read well'}, {notes}"
        misread += [name] if wrong else []
    assert misread or not kind.misread


@pytest.mark.parametrize("name", ["nf4_conv1d", "nf4_conv1d_storage_bf16"])
def test_gpt2_in_bitsandbytes(name: str, tmp_path: Path) -> None:
    """GPT-2's layers, turned before they are packed: transformers' logits of its own file, in bfloat16."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = FIXTURES / "bitsandbytes" / name
    convert(open_checkpoint(str(folder)), "bitsandbytes", tmp_path / "written")
    computes_as(tmp_path / "written", folder)
    assert torch.equal(logits(tmp_path / "written", torch.bfloat16), logits(folder, torch.bfloat16))


@pytest.fixture
def autoawq_layer(monkeypatch: pytest.MonkeyPatch) -> type[torch.nn.Module]:
    """AutoAWQ's WQLinear_GEMM on its path without kernels; the whole package needs an old transformers."""
    monkeypatch.setitem(sys.modules, "awq", without_init("awq"))
    gemm = importlib.import_module("awq.modules.linear.gemm")
    monkeypatch.setattr(gemm, "awq_ext", None)
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)
    return gemm.WQLinear_GEMM


@pytest.mark.parametrize("name", names(AwqWriter, "*"), ids=lambda name: name.replace("/", "-"))
@pytest.mark.filterwarnings("ignore:Using naive")
def test_awq_in_autoawq(name: str, autoawq_layer: type[torch.nn.Module], tmp_path: Path) -> None:
    """Its own layer takes the written tensors; of one-hot inputs it gives the weight, in float16.

    The layer is float16; scales in bfloat16 go through the function that it calls.
    """
    from safetensors.torch import load_file

    try:
        wanted = written_modules(name, "awq", tmp_path / "out")
    except LowbitError as error:
        pytest.skip(error.message)  # one scale for another width than the groups'
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for stem, exact in wanted.items():
        rows, columns = exact.shape
        own = {key.removeprefix(f"{stem}."): v for key, v in tensors.items() if key.startswith(f"{stem}.")}
        group = told["group_size"] if told["group_size"] != -1 else columns
        if own["scales"].dtype == torch.bfloat16:
            words = (own[part] for part in ("qweight", "qzeros", "scales"))
            found = sys.modules["awq.utils.packing_utils"].dequantize_gemm(*words, told["bits"], group).T
            assert torch.equal(found, exact.bfloat16()), stem
            continue
        layer = autoawq_layer(told["bits"], group, columns, rows, "bias" in own, "cpu")
        layer.load_state_dict(own)
        one_hot = torch.eye(columns, dtype=torch.float16)[None]
        found = layer(one_hot).reshape(columns, rows).T
        bias = own["bias"].half()[:, None] if "bias" in own else 0
        assert torch.equal(found, exact.half() + bias), stem


@pytest.mark.parametrize(
    ("form", "name"),
    [("gptq", name) for name in names(GptqWriter, "gptq")]
    + [("gptq", "auto_round/w4_asym_awq"), ("awq", "awq/gemm"), ("awq", "gptq/w4_sym")],
    ids=lambda value: value.replace("/", "-"),
)
def test_gptq_and_awq_in_gptqmodel(form: str, name: str, tmp_path: Path) -> None:
    """GPTQModel loads what is written; its layers dequantize to the exact weights in float16."""
    tool = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    sys.path.append(str(FIXTURES / "making"))
    from tiny import tokenizer

    wanted = written_modules(name, form, tmp_path / "out")
    tokenizer().save_pretrained(tmp_path / "out")  # it loads no model without one
    backend = tool.BACKEND.TORCH_AWQ if form == "awq" else tool.BACKEND.TORCH
    model = tool.GPTQModel.load(str(tmp_path / "out"), device="cpu", backend=backend, dtype=torch.float16)
    for stem, exact in wanted.items():
        layer = model.model.get_submodule(stem)
        if form == "gptq":
            assert torch.equal(layer.dequantize_weight().T, exact.half()), stem
            continue
        bias = 0 if layer.bias is None else layer.bias[:, None]
        assert torch.equal(layer(torch.eye(exact.shape[1], dtype=torch.float16)).T, exact.half() + bias), stem


def test_gptq_with_plain_kinds_of_layers(tmp_path: Path) -> None:
    """Left alone in every block: transformers and GPTQModel each have their own word for it."""
    tool = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    pytest.importorskip("optimum", reason="optimum, through which transformers reads gptq, is not installed")
    from loading.test_quantizing import OPTIONS, make, with_tokenizer

    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    header, out = open_checkpoint(str(tmp_path / "float")), tmp_path / "out"
    asked = Asked(f"gptq:{OPTIONS},group_size=32", ignore="down_proj,o_proj")
    load_model(header, device="cpu", quantization=asked, save=out)
    convert(open_checkpoint(str(out)), "dense", tmp_path / "dense")
    wanted, found = logits(tmp_path / "dense"), logits(out)
    assert torch.nn.functional.cosine_similarity(found, wanted, -1).min() > 0.995
    model = tool.GPTQModel.load(str(out), device="cpu", backend=tool.BACKEND.TORCH, dtype=torch.float16)
    kinds = {name: type(layer).__name__ for name, layer in model.model.named_modules()}
    assert {kinds[f"model.layers.{n}.mlp.down_proj"] for n in (0, 1)} == {"Linear"}
    assert "Torch" in kinds["model.layers.1.mlp.up_proj"]


def test_calibrated_gptq_in_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lowbit's GPTQ made: GPTQModel takes the words on how it was run, and the weights."""
    tool = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from loading.test_quantizing import OPTIONS, make, with_tokenizer

    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    header, out = open_checkpoint(str(tmp_path / "float")), tmp_path / "out"
    load_model(header, device="cpu", quantization=f"gptq:{OPTIONS},group_size=32", save=out)
    model = tool.GPTQModel.load(str(out), device="cpu", backend=tool.BACKEND.TORCH, dtype=torch.float16)
    config = model.quantize_config
    assert config.static_groups is True and config.desc_act is False and config.act_group_aware is False
    assert config.damp_percent == 0.05
    source = SourceModel(open_checkpoint(str(out)), strict=True)
    with TensorData(source.header) as data:
        for module in source.modules:
            if not module.scheme.is_dense:
                exact = source.read(module, data).weight.dequantize()
                layer = model.model.get_submodule(module.target.stored)
                assert torch.equal(layer.dequantize_weight().T, exact.half()), module.target.name


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("w8a8_int8", "sglang/w8a8_int8"),
        ("w8a8_fp8", "sglang/w8a8_fp8"),
        ("w8a8_fp8", "compressed_tensors/fp8_channel_dynamic"),
        ("w8a8_fp8", "quark/fp8_token"),
        ("blockwise_int8", "sglang/blockwise_int8"),
    ],
    ids=lambda value: value.replace("/", "-"),
)
def test_w8a8_in_sglang(form: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's linear layers load what is written; its functions dequantize it to the exact weights."""
    from safetensors.torch import load_file

    pytest.importorskip("sglang.version", reason="sglang is not installed; its unpacked wheel is enough")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.path += [str(FIXTURES / "sglang"), str(FIXTURES / "making")]
    from make_sglang import loaded

    wanted = written_modules(name, form, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for stem, exact in wanted.items():
        own = {key.removeprefix(f"{stem}."): v for key, v in tensors.items() if key.startswith(f"{stem}.")}
        assert torch.equal(loaded(stem, own, told), exact), stem


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


def test_fp8_a_row_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 with scales a row as fbgemm_fp8: its layers hold the exact weights and give about the plain logits.

    transformers asks for a GPU; without one FBGEMM's own functions for CPUs stand in for its operators.
    """
    from unittest.mock import patch

    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        monkeypatch.setitem(sys.modules, "fbgemm_gpu", without_init("fbgemm_gpu"))
        genai = "fbgemm_gpu.experimental.gen_ai"  # its operators, which transformers imports
        monkeypatch.setitem(sys.modules, genai, ModuleType(genai))
        fbgemm = importlib.import_module("fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm")
        from transformers.quantizers.quantizer_fbgemm_fp8 import FbgemmFp8HfQuantizer

        def product(x: Tensor, weight: Tensor, inputs: Tensor, rows: Tensor, use_fast_accum: bool) -> Tensor:
            with patch.object(torch.version, "cuda", "12.8"):  # else it takes AMD's FP8 alone
                return fbgemm.matmul_fp8_row(x, weight, inputs, rows.flatten())

        monkeypatch.setattr(FbgemmFp8HfQuantizer, "validate_environment", lambda *_, **__: None)

        def rows(x: Tensor, scale_ub: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return fbgemm.quantize_fp8_row(x)  # the bound is in no file, and nothing sets it on a CPU

        operators = {"quantize_fp8_per_row": rows, "f8f8bf16_rowwise": product}
        monkeypatch.setattr(torch.ops, "fbgemm", SimpleNamespace(**operators))
    wanted = written_modules("compressed_tensors/fp8_channel_dynamic", "fp8", tmp_path / "written")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.bfloat16, device_map=place)
    for stem, exact in wanted.items():
        layer = model.get_submodule(stem)
        assert type(layer).__name__ == "FbgemmFp8Linear"
        assert torch.equal((layer.weight.float() * layer.weight_scale.float()).cpu(), exact), stem
    convert(open_checkpoint(str(tmp_path / "written")), "dense", tmp_path / "dense")
    with torch.no_grad():
        found = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]], device=place)).logits.float().cpu()
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
        "modelopt/fp8_pb_wo",
    ],
)
def test_modelopt_s_own_tensors(name: str, tmp_path: Path) -> None:
    """ModelOpt loads no exported checkpoint; its quantized tensors dequantize what is written."""
    pytest.importorskip("modelopt.torch", reason="nvidia-modelopt is not installed")
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


@pytest.mark.parametrize("name", ["modelopt/int4_awq", "gptq/w4_sym"])
def test_modelopt_packs_the_same_int4(name: str, tmp_path: Path) -> None:
    """ModelOpt unpacks no int4: its packer gives, of the exact weights, the bytes that are written."""
    export = pytest.importorskip(
        "modelopt.torch.export.quant_utils", reason="nvidia-modelopt is not installed"
    )
    from safetensors.torch import load_file

    wanted = written_modules(name, "modelopt", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for stem, exact in wanted.items():
        scale = tensors[f"{stem}.weight_scale"].float()
        group = exact.shape[1] // scale.shape[1]
        assert torch.equal(export.pack_int4_in_uint8(exact, scale, group), tensors[f"{stem}.weight"]), stem


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
    [*(n for n in names(MlxWriter, "mlx") if n != "mlx/experts"), "gptq/w4_sym", "awq/gemm"],
    ids=lambda name: name.replace("/", "-"),
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
