"""load_model: the flag that may only repeat the config, refusals by name, parts that fuse or stay apart."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import FIXTURES, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import detect
from lowbit.formats.refused import REFUSED
from lowbit.kernels import native
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.loading import load_model, plan_model
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.quantize.recipe import Asked
from models.family_cases import saved
from models.test_quantized_models import CASES, loaded_as_planned

W4A16 = FIXTURES / "compressed_tensors" / "w4a16_group"
NF4 = FIXTURES / "bitsandbytes" / "nf4"


@pytest.mark.parametrize(
    ("folder", "asked"), [(W4A16, "compressed-tensors"), (NF4, "bitsandbytes"), (NF4, "bnb")]
)
def test_the_flag_may_repeat_the_config(folder: Path, asked: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        plan_model(open_checkpoint(str(folder)), quantization=asked)
    assert "not needed" in caplog.text


@pytest.mark.parametrize("asked", ["gptq", "fp8", "int3x", "awq_marlin"])
def test_another_method_is_refused(asked: str) -> None:
    with pytest.raises(LowbitError) as caught:
        load_model(open_checkpoint(str(W4A16)), quantization=asked)
    assert caught.value.code == "E0401"
    assert asked in str(caught.value) and "compressed-tensors" in str(caught.value)


@pytest.mark.parametrize(
    ("fixture", "accepted", "refused"),
    [
        ("auto_round/w4_sym", "gptq_marlin", "awq_marlin"),
        ("auto_round/w4_asym_awq", "awq", "gptq"),
        ("auto_round/nvfp4", "compressed-tensors", "gptq"),
        ("fp8/mxfp8", "mxfp8", "fbgemm_fp8"),
        ("fp8/block_128", "fp8", "mxfp8"),
        ("modelopt/nvfp4", "modelopt_fp4", "modelopt_fp8"),
        ("modelopt/fp8_pb_wo", "modelopt_fp8", "fp8"),
        ("modelopt/mixed", "modelopt_mixed", "modelopt_fp8"),
        ("gptq/w4_sym", "gptq_marlin", "awq"),
        ("awq/gemm", "awq_marlin", "gptq"),
    ],
)
def test_aliases_that_fit_the_checkpoint(fixture: str, accepted: str, refused: str) -> None:
    header = open_checkpoint(str(FIXTURES / fixture))
    plan_model(header, quantization=accepted)
    with pytest.raises(LowbitError) as caught:
        plan_model(header, quantization=refused)
    assert caught.value.code == "E0401" and f"--quantization {refused}:" in str(caught.value)


def test_strict_reaches_the_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the settings of a server, and from lowbit inspect."""
    from lowbit.cli import main
    from lowbit.engine.load import load_engine
    from lowbit.settings import Settings

    folder = Path(shutil.copytree(FIXTURES / "modelopt" / "fp8", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "NVFP4"
    (folder / "config.json").write_text(json.dumps(config))
    words = {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(16)}, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    with pytest.raises(LowbitError) as caught:
        load_engine(Settings(model=str(folder), strict=True))
    assert caught.value.code == "E0214" and "is stored as fp8" in str(caught.value)
    assert main(["inspect", str(folder), "--strict", "--json"]) == caught.value.exit_code
    assert "E0214" not in caplog.text
    assert main(["inspect", str(folder), "--json"]) == 0
    assert caplog.text.count("E0214") == 1, "one warning, however many modules"


def test_kernel_aliases(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    for method, alias in (("gptq", "gptq_marlin"), ("awq", "awq_marlin")):
        folder = write_folder(
            tmp_path / method, tensors, {"quant_method": method, "bits": 4, "group_size": 32}
        )
        from lowbit.formats import Notes, detect
        from lowbit.loading import check_quantization

        header = open_checkpoint(str(folder))
        check_quantization(detect(header)(header, Notes()), Asked(alias))
        with pytest.raises(LowbitError):
            check_quantization(detect(header)(header, Notes()), Asked("fp8"))


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_everything_else_is_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.embed_tokens.weight": torch.ones(2, 2)}, {"quant_method": method})
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(folder)))
    assert caught.value.code == "E0211" and method in str(caught.value)
    assert REFUSED[method] in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("codebooks", "aqlm"),
        ("centroids.weight", "vptq"),
        ("dense_weights", "spqr"),
        ("Qidxs", "quip_sharp"),
    ],
)
def test_read_methods_whose_config_is_lost(suffix: str, method: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    folder = write_folder(tmp_path, {name: torch.ones(2, 2)}, None)
    with pytest.raises(LowbitError, match=f"weights are {method}'s .*restore") as caught:
        plan_model(open_checkpoint(str(folder)))
    assert caught.value.code == "E0211" and name in str(caught.value)


@pytest.mark.parametrize("copied", [False, True])
def test_mlx_names_no_method(copied: bool, tmp_path: Path) -> None:
    written = {"group_size": 64, "bits": 4}
    folder = write_folder(tmp_path, {"model.embed_tokens.scales": torch.ones(2, 2)}, None)
    config = json.loads((folder / "config.json").read_text()) | {"quantization": written}
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": written} if copied else {}))
    )
    assert detect(open_checkpoint(str(folder))).name == "mlx"


@pytest.mark.parametrize(
    ("file", "code", "said"), [("qmodel.pt", "E0230", "weight files"), ("params.json", "E0201", "Hug")]
)
def test_layouts_of_other_tools(file: str, code: str, said: str, tmp_path: Path) -> None:
    if file != "params.json":
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("{}")
    with pytest.raises(LowbitError, match=re.escape(said)) as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == code


@pytest.mark.parametrize("packing", ["mlx", "auto_round:fake"])
def test_packings_of_auto_round_that_are_not_read(packing: str, tmp_path: Path) -> None:
    written = {"quant_method": "auto-round", "bits": 8, "group_size": 64, "packing_format": packing}
    folder = write_folder(tmp_path, {"model.embed_tokens.weight": torch.ones(2, 2)}, written)
    with pytest.raises(LowbitError, match="--format auto_gptq") as caught:
        plan_model(open_checkpoint(str(folder)))
    assert caught.value.code == "E0218" and packing in str(caught.value)


@pytest.mark.parametrize("dress", ["awq", "fp8"])
def test_quark_under_another_name(dress: str, tmp_path: Path) -> None:
    written = {"quant_method": dress, "export": {"kv_cache_group": []}}
    folder = write_folder(tmp_path, {"model.embed_tokens.weight": torch.ones(2, 2)}, written)
    assert detect(open_checkpoint(str(folder))).name == "quark"


def test_unknown_method(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.embed_tokens.weight": torch.ones(2, 2)}, {"quant_method": "q9"})
    with pytest.raises(LowbitError, match="'q9'.*known: .*gptq"):
        plan_model(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("suffix", "method"),
    [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"), ("weight_scale_inv", "FP8")],
)
def test_quantized_tensors_without_a_config(suffix: str, method: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(2, 2)}, None)
    with pytest.raises(LowbitError, match=method) as caught:
        plan_model(open_checkpoint(str(folder)))
    assert caught.value.code == "E0213" and suffix in str(caught.value)


def renamed(folder: Path, source: Path, rename: dict[str, str]) -> Path:
    """A copy with tensors' name prefixes changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    changed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in rename.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        changed[name] = tensor
    save_file(changed, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_prefixes_of_multimodal_wrappers(prefix: str, tmp_path: Path) -> None:
    head = {"lm_head.": "language_model.lm_head."} if prefix.startswith("language") else {}
    folder = renamed(tmp_path / "m", W4A16, {"model.": prefix, **head})
    tokens = [3, 1, 4, 1, 5]
    models = [load_model(open_checkpoint(str(path)), device="cpu") for path in (W4A16, folder)]
    first, second = (prompt_logits(model, [tokens])[0] for model in models)
    assert torch.equal(first, second)


def weights_of(folder: Path) -> list[PackedWeight]:
    model = load_model(open_checkpoint(str(folder)), device="cpu")
    return model.blocks[0].qkv.weights


def test_equal_parts_fuse() -> None:
    assert len(weights_of(W4A16)) == 1


def test_unlike_parts_run_by_themselves(tmp_path: Path) -> None:
    """k is replaced by a plain matrix: q, k and v stay three, nothing is dropped."""
    shutil.copytree(NF4, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stem = "model.layers.0.self_attn.k_proj.weight"
    plain = torch.randn(32, 64, dtype=torch.bfloat16)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}
    save_file({**kept, stem: plain}, tmp_path / "m" / "model.safetensors")
    found = weights_of(tmp_path / "m")
    assert [weight.shape[0] for weight in found] == [64, 32, 32]
    assert str(found[1].scheme) == "bf16" and str(found[0].scheme) == str(found[2].scheme) == "nf4 1x64 f32"


def test_neighbours_fuse_without_the_third(tmp_path: Path) -> None:
    shutil.copytree(NF4, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stem = "model.layers.0.self_attn.v_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}
    save_file({**kept, stem: torch.randn(32, 64)}, tmp_path / "m" / "model.safetensors")
    assert [weight.shape[0] for weight in weights_of(tmp_path / "m")] == [96, 32]


def test_tied_quantized_embedding() -> None:
    folder = FIXTURES / "compressed_tensors" / "embedding"
    plan = plan_model(open_checkpoint(str(folder)))
    schemes = {module.name: str(module.scheme) for module in plan.modules}
    assert not schemes["model.embed_tokens"].startswith("bf16")


@pytest.mark.parametrize("fault", ["rows swapped", "two groups swapped", "a plain matrix", "NaN"])
def test_a_kernel_that_disagrees_is_not_served(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at start: each weight's kernel against the reference on a few of its rows."""
    from lowbit.kernels.reference import Reference

    class Wrong(Reference):
        name = "wrong"

        def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
            if fault == "two groups swapped" and not weight.scheme.is_dense:
                [scale] = weight.scales
                weight = replace(weight, scales=(torch.cat((scale[:, 1:2], scale[:, :1], scale[:, 2:]), 1),))
            if fault == "a plain matrix" and weight.scheme.is_dense:
                weight = replace(weight, codes=weight.codes.roll(1, 1))
            return super().pack(weight, device)

        def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
            y = super().linear(x, packed, out)
            if fault == "rows swapped":
                return y.roll(1, 1)
            return y * float("nan") if fault == "NaN" else y

    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Wrong(),))
    with pytest.raises(LowbitError) as caught:
        load_model(open_checkpoint(str(W4A16)), device="cpu")
    assert caught.value.code == "E0705" and "'wrong' gives" in str(caught.value)
    layer = "embed_tokens" if fault not in ("two groups swapped",) else "model.layers.0."
    assert layer in str(caught.value) and re.search(r"gives \S+ and the reference \S+;", str(caught.value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_none_are_no_kernels_fault(value: float, tmp_path: Path) -> None:
    shutil.copytree(W4A16, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][20:24] = value
    save_file(tensors, file)
    load_model(open_checkpoint(str(tmp_path / "m")), device="cpu")


def test_leftover_tensor_is_refused(tmp_path: Path) -> None:
    shutil.copytree(W4A16, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.extra.weight": torch.ones(1)}, file)
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(tmp_path / "m")))
    assert caught.value.code == "E0217"


def test_plan_and_load_agree() -> None:
    """Of checkpoints that models/test_quantized_models.py leaves out: it asserts the same of all others."""
    found = 0
    for path in sorted(FIXTURES.glob("*/*/config.json")):
        if json.loads(path.read_text()).get("architectures") != ["LlamaForCausalLM"]:
            continue
        if str(path.parent.relative_to(FIXTURES)) in CASES:
            continue
        header = open_checkpoint(str(path.parent))
        loaded_as_planned(load_model(header, device="cpu"), plan_model(header, device="cpu"))
        found += 1
    assert found > 20


def test_int8_inputs_that_nobody_can_take_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """nf4 has no whole numbers; of W4A16 every linear layer takes them, where there are native kernels."""
    text = "no layer here has weights and a kernel that can meet int8 inputs"
    load_model(open_checkpoint(str(NF4)), device="cpu", activation_quantization="int8")
    assert text in caplog.text
    caplog.clear()
    load_model(open_checkpoint(str(W4A16)), device="cpu", activation_quantization="int8")
    assert (text in caplog.text) is (native.library() is None)


def test_rotary_tables_reach_as_far_as_sequences_may(tmp_path: Path) -> None:
    """--context-length beyond the model's own: transformers' logits, whose angles have no end."""
    oracle = saved(
        "Llama", tmp_path, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    tokens = torch.arange(40) * 7 % 61
    header = open_checkpoint(str(tmp_path))
    model = load_model(header, device="cpu", dtype="float32", context_length=40)
    assert model.context_length == 40
    with torch.no_grad():
        wanted = oracle(tokens[None]).logits[0]
    assert (prompt_logits(model, [tokens.tolist()])[0] - wanted).abs().max() < 1e-4
    assert load_model(header, device="cpu", dtype="float32", context_length=8).context_length == 16
