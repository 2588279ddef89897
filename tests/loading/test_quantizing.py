"""--save-quantized and calibrated methods: what is saved is what was served, and made once."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import FineGrainedFP8Config, LlamaForCausalLM, MixtralForCausalLM

from formats.helpers import FIXTURES
from forward_helpers import prompt_logits
from loading.test_convert_gguf import fused
from loading.test_online import PROMPT
from loading.test_online import make as make_float32
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.writing import writer_of
from lowbit.loading import Calibration, load_model, plan_model, quantizing
from lowbit.loading.convert import convert
from lowbit.quantize.recipe import Asked
from lowbit.tokenization import load_tokenizer
from models.family_cases import SIZES, saved


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is found in, or left in, the user's cache."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path, *arguments: type, **changes: object) -> None:
    """In bfloat16, whose K and V are cached as those of a quantized model; wider than a block."""
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 8, "num_hidden_layers": 2}
    make_float32(folder, *arguments, **{**sizes, **changes}).bfloat16().save_pretrained(folder)


def with_tokenizer(folder: Path) -> None:
    """One token a letter, so that any text calibrates a vocabulary of 96."""
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {letter: number + 1 for number, letter in enumerate(letters)} | {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


SAVED = {
    "fp8": "compressed-tensors",
    "fp8:weights=block": "fp8",
    "fp8:weights=tensor": "compressed-tensors",
    "w8a8_fp8": "w8a8_fp8",
    "w8a8_int8": "w8a8_int8",
    "blockwise_int8": "blockwise_int8",
    "mxfp8": "compressed-tensors",
    "mxfp4": "compressed-tensors",
    "nvfp4": "compressed-tensors",
    "nf4": "bitsandbytes",
    "fp4:double_quant=true": "bitsandbytes",
    "bitsandbytes:type=int8": "bitsandbytes",
    "rtn": "compressed-tensors",
    "int8:symmetric=true": "compressed-tensors",
    "int3:group_size=64": "compressed-tensors",
    "hqq": "hqq",
}


@pytest.mark.parametrize("method", SAVED)
def test_what_is_saved_is_what_was_served(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what another tool makes of the folder without an error is said."""
    make(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    served = load_model(header, device="cpu", quantization=method)
    out = tmp_path / "saved"
    first = load_model(header, device="cpu", quantization=method, save=out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == SAVED[method]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    misread = writer_of(SAVED[method]).misread
    assert said == ([f"lowbit: {misread}"] if misread else [])
    loaded = load_model(open_checkpoint(str(out)), device="cpu", strict=True)
    logits = [prompt_logits(model, [PROMPT])[0] for model in (served, first, loaded)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])
    assert first.quantization == f"{method}, quantized at load"
    with pytest.raises(LowbitError, match="saved") as caught:
        load_model(header, device="cpu", quantization=method, save=out)
    assert caught.value.code == "E0302"


def outer_scales(folder: Path, suffix: str = "weight_global_scale") -> dict[str, float]:
    """By the modules of a folder."""
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[0]: float(t) for name, t in tensors.items() if name.endswith(suffix)}


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MixtralForCausalLM])
def test_parts_of_a_layer_have_one_outer_scale(kind: type, tmp_path: Path) -> None:
    """vLLM and SGLang run Q, K and V as one matrix, gate and up too, and take one outer scale for it."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind is MixtralForCausalLM else {}
    make(tmp_path / "float", kind, **experts)
    source = tmp_path / "float" / "model.safetensors"
    tensors = load_file(source)
    for name in tensors:
        if name.endswith(("k_proj.weight", "up_proj.weight", "w3.weight")):
            tensors[name] *= 3
    save_file(tensors, source, {"format": "pt"})
    header = open_checkpoint(str(tmp_path / "float"))
    served = load_model(header, device="cpu", quantization="nvfp4")
    load_model(header, device="cpu", quantization="nvfp4", save=tmp_path / "saved")
    convert(header, "modelopt", tmp_path / "modelopt", requantize="nvfp4")
    saved, other = (
        outer_scales(tmp_path / "saved"),
        outer_scales(tmp_path / "modelopt", "weight_scale_2"),
    )
    assert all(1 / saved[name] == pytest.approx(other[name]) for name in saved) and len(saved) == len(other)
    layers: dict[str, set[float]] = {}
    for name, scale in saved.items():
        layer = re.sub(r"[qkv]_proj$|(gate|up)_proj$|w[13]$", "", name)
        layers.setdefault(layer if layer != name else f"{name}.", set()).add(scale)
    assert all(len(scales) == 1 for scales in layers.values()) and len(layers) < len(saved)
    assert len(set(saved.values())) > 1
    loaded = load_model(open_checkpoint(str(tmp_path / "saved")), device="cpu", strict=True)
    assert torch.equal(prompt_logits(served, [PROMPT])[0], prompt_logits(loaded, [PROMPT])[0])


def test_a_mixed_recipe_is_saved_whole(tmp_path: Path) -> None:
    make(tmp_path / "float", MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'default = "int4"\n[[rule]]\nmodules = "attention"\nquantization = "int8"\ngroup_size = 32\n'
        '[[rule]]\nmodules = "layers.1.mlp"\nquantization = "keep"\n'
    )
    asked = Asked(recipe_file=str(recipe))
    header = open_checkpoint(str(tmp_path / "float"))
    served = load_model(header, device="cpu", quantization=asked)
    load_model(header, device="cpu", quantization=asked, save=tmp_path / "saved")
    plan = plan_model(open_checkpoint(str(tmp_path / "saved")))
    schemes = {module.name: str(module.scheme) for module in plan.modules}
    assert schemes["model.layers.0.self_attn.q_proj"] == "uint8 1x32 f16 asym"
    assert schemes["model.layers.1.mlp.experts.0.gate_proj"] == "bf16"
    loaded = load_model(open_checkpoint(str(tmp_path / "saved")), device="cpu")
    assert torch.equal(prompt_logits(served, [PROMPT])[0], prompt_logits(loaded, [PROMPT])[0])


def test_what_no_file_can_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    with pytest.raises(LowbitError, match="cannot be saved without changing its numbers") as caught:
        load_model(header, quantization="fp8:activation=delayed", save=tmp_path / "saved")
    assert caught.value.code == "E0450" and not (tmp_path / "saved").exists()
    with pytest.raises(LowbitError, match="--save-quantized needs") as caught:
        load_model(header, save=tmp_path / "saved")
    assert caught.value.code == "E0405"
    with pytest.raises(LowbitError, match="--calibration-data is for methods that calibrate") as caught:
        load_model(header, quantization="int4", calibration=Calibration(tmp_path / "text.txt"))
    assert caught.value.code == "E0405"


OPTIONS = "sequences=4,length=64"


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (f"gptq:{OPTIONS}", "gptq"),
        (f"gptq:bits=8,symmetric=false,group_size=32,{OPTIONS}", "gptq"),
        (f"awq:{OPTIONS},group_size=64", "awq"),
        (f"awq:{OPTIONS}", "compressed-tensors"),  # 256 and 320 columns have no common default
    ],
)
def test_calibrated_methods_run_once(
    method: str, form: str, tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "float", LlamaForCausalLM)
    with_tokenizer(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    told: list[tuple[int, str]] = []
    first = load_model(
        header,
        device="cpu",
        quantization=method,
        on_progress=lambda done, total, what: told.append((done, what)),
    )
    assert (header.nbytes // 2, f"calibrating {method.partition(':')[0]}") in told, "one of two blocks"
    [made] = (own_cache / "quantized").iterdir()
    config = json.loads((made / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == form
    with caplog.at_level(logging.INFO, "lowbit"):
        second = load_model(header, device="cpu", quantization=method)
    assert "was quantized before" in caplog.text
    assert torch.equal(prompt_logits(first, [PROMPT])[0], prompt_logits(second, [PROMPT])[0])
    assert first.quantization == f"{method}, quantized at load"


@pytest.mark.parametrize("method", [f"gptq:bits=3,{OPTIONS}", "hqq", "int4wo-32", "mxfp4"])
def test_a_method_that_no_layer_can_have_saves_nothing(method: str, tmp_path: Path) -> None:
    make(tmp_path / "float", hidden_size=72, intermediate_size=104, num_attention_heads=4)
    with_tokenizer(tmp_path / "float")
    header, out = open_checkpoint(str(tmp_path / "float")), tmp_path / "saved"
    with pytest.raises(LowbitError, match=r"quantizes no layer of float .*q_proj: .*; choose") as caught:
        load_model(header, device="cpu", quantization=method, save=out)
    assert caught.value.code == "E0403" and not list(tmp_path.glob("saved*"))


def test_requantizing_what_no_layer_can_have(tmp_path: Path) -> None:
    make(tmp_path / "float", hidden_size=72, intermediate_size=104, num_attention_heads=4)
    with pytest.raises(LowbitError, match=r"requantize hqq quantizes no layer .*q_proj.*72") as caught:
        convert(open_checkpoint(str(tmp_path / "float")), "hqq", tmp_path / "hqq", requantize="hqq")
    assert caught.value.code == "E0403" and not list(tmp_path.glob("hqq*"))


def test_awq_with_groups_as_wide_as_some_rows(tmp_path: Path) -> None:
    """128 columns are one group by default, and 96 have groups of 32: AWQ's files cannot hold both."""
    make(tmp_path / "float", hidden_size=128, intermediate_size=96)
    with_tokenizer(tmp_path / "float")
    header, out = open_checkpoint(str(tmp_path / "float")), tmp_path / "saved"
    load_model(header, device="cpu", quantization=f"awq:{OPTIONS}", save=out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    with pytest.raises(LowbitError, match="one scale for its 128 columns, other modules have groups of 32"):
        convert(open_checkpoint(str(out)), "awq", tmp_path / "awq")
    assert not list(tmp_path.glob("awq*"))


@pytest.mark.parametrize("method", ["int4:group_size=32", "nf4", f"gptq:group_size=32,{OPTIONS}"])
def test_stacked_experts_are_saved_one_by_one(method: str, tmp_path: Path) -> None:
    """Granite's lie in stacks of gate above up, which no quantized format has."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 96}
    saved("GraniteMoe", tmp_path / "float", **SIZES | sizes).bfloat16().save_pretrained(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    header, out = open_checkpoint(str(tmp_path / "float")), tmp_path / "saved"
    first = load_model(header, device="cpu", quantization=Asked(method, ignore="layers.1.mlp"), save=out)
    loaded = open_checkpoint(str(out))
    second = load_model(loaded, device="cpu", strict=True)
    assert torch.equal(prompt_logits(first, [PROMPT])[0], prompt_logits(second, [PROMPT])[0])
    if not method.startswith("gptq"):
        served = load_model(header, device="cpu", quantization=Asked(method, ignore="layers.1.mlp"))
        assert torch.equal(prompt_logits(first, [PROMPT])[0], prompt_logits(served, [PROMPT])[0])
    schemes = {module.name: module.scheme for module in plan_model(loaded).modules}
    experts = {name: scheme.is_dense for name, scheme in schemes.items() if ".experts." in name}
    leaves = [f"0.mlp.experts.{n}.{leaf}_proj" for n in range(3) for leaf in ("gate", "up", "down")]
    quantized = [name.removeprefix("model.layers.") for name, plain in experts.items() if not plain]
    assert quantized == leaves
    assert "model.layers.1.block_sparse_moe.input_linear.weight" in loaded.tensors, "kept as it was"


def test_other_text_options_or_weights_are_another_result(tmp_path: Path, own_cache: Path) -> None:
    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    method = f"gptq:{OPTIONS}"

    def logits(quantization: str = method, text: str | None = None) -> torch.Tensor:
        file = None
        if text is not None:
            file = tmp_path / "text.txt"
            file.write_text(text * 40)
        header = open_checkpoint(str(tmp_path / "float"))
        model = load_model(header, device="cpu", quantization=quantization, calibration=Calibration(file))
        return prompt_logits(model, [PROMPT])[0]

    built_in = logits()
    other = logits(text="0123456789 zyxwvutsrqponm LKJIHGFEDCBA ")
    assert not torch.equal(built_in, other)
    assert torch.equal(built_in, logits())
    assert len(list((own_cache / "quantized").iterdir())) == 2
    assert not torch.equal(built_in, logits(f"gptq:act_order=false,{OPTIONS}"))
    make(tmp_path / "float", tie_word_embeddings=True)
    with_tokenizer(tmp_path / "float")
    logits()
    assert len(list((own_cache / "quantized").iterdir())) == 4


def test_calibration_leaves_alone_what_a_recipe_keeps(tmp_path: Path) -> None:
    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    asked = Asked(f"gptq:{OPTIONS}", ignore="layers.0.mlp")
    load_model(header, device="cpu", quantization=asked, save=tmp_path / "saved")
    schemes = {m.name: str(m.scheme) for m in plan_model(open_checkpoint(str(tmp_path / "saved"))).modules}
    assert schemes["model.layers.0.mlp.up_proj"] == schemes["model.layers.0.mlp.down_proj"] == "bf16"
    assert schemes["model.layers.1.mlp.up_proj"] == "int4 1x128 f16"
    with pytest.raises(LowbitError, match="take all of them or none") as caught:
        load_model(header, device="cpu", quantization=Asked(f"gptq:{OPTIONS}", ignore="q_proj"))
    assert caught.value.code == "E0405"


MIXED = {
    "keep": 'quantization = "keep"',
    "int8": 'quantization = "int8"\ngroup_size = 32',
}
# A norm that attention and MLP share scales both; the rows of Falcon's Q, K and V lie in groups.
SHARED_NORM: dict[str, dict[str, object]] = {
    "Cohere": {"num_key_value_heads": 2},
    "Falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "alibi": False,
        "intermediate_size": 512,
    },
}


@pytest.mark.parametrize("family", SHARED_NORM)
@pytest.mark.parametrize("other", MIXED)
def test_other_modules_take_over_scales_of_awq(family: str, other: str, tmp_path: Path) -> None:
    """Kept, or quantized by another method, in the rows of the file."""
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    kind = getattr(transformers, f"{family}Config")
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(kind(**{**sizes, **SHARED_NORM[family]}))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.uniform_(0.3, 0.6) if norm else parameter.normal_(0, 0.1)
            if norm:
                parameter[torch.randperm(len(parameter))[:6]] *= 12  # loud channels: scales far from 1
    model.save_pretrained(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    recipe = tmp_path / "recipe.toml"
    rule = f'[[rule]]\nmodules = ["qkv_proj", "query_key_value"]\n{MIXED[other]}\n'
    recipe.write_text(f'default = "awq:{OPTIONS},group_size=64"\n{rule}')
    header = open_checkpoint(str(tmp_path / "float"))
    load_model(header, device="cpu", quantization=Asked(recipe_file=str(recipe)), save=tmp_path / "saved")
    loaded = load_model(open_checkpoint(str(tmp_path / "saved")), device="cpu", strict=True)
    wanted = prompt_logits(load_model(header, device="cpu"), [PROMPT])[0].float().log_softmax(-1)
    found = prompt_logits(loaded, [PROMPT])[0].float().log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.02


def test_what_becomes_another_format_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """256 and 320 columns have groups of 128 and 64: AWQ's files have one, GPTQ's rules are GPTQModel's."""
    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    load_model(header, device="cpu", quantization=f"awq:{OPTIONS}", save=tmp_path / "awq")
    assert (
        "it is a compressed-tensors checkpoint (awq: --format awq: groups are 64 in model.layers"
        in caplog.text
    )
    assert "or quantize with group_size=64" in caplog.text
    caplog.clear()
    load_model(header, device="cpu", quantization=f"gptq:{OPTIONS}", save=tmp_path / "gptq")
    assert "For transformers: group_size=64 where groups alone differ, --format" in caplog.text
    caplog.clear()
    load_model(header, device="cpu", quantization=f"gptq:{OPTIONS},group_size=64", save=tmp_path / "one")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_calibration_text_begins_with_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence, as what is served does, and no document in the middle of one."""
    make(tmp_path / "float")
    with_tokenizer(tmp_path / "float")
    tokenizer = Tokenizer.from_file(str(tmp_path / "float" / "tokenizer.json"))
    tokenizer.add_special_tokens(["~"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A", special_tokens=[("~", tokenizer.token_to_id("~"))]
    )
    tokenizer.save(str(tmp_path / "float" / "tokenizer.json"))
    (tmp_path / "float" / "tokenizer_config.json").write_text('{"bos_token": "~"}')
    seen: list[list[int]] = []
    plain = quantizing.calibrate

    def recorded(header: object, sequences: list[list[int]], *arguments: object, **others: object) -> object:
        seen.extend(sequences)
        return plain(header, sequences, *arguments, **others)

    monkeypatch.setattr(quantizing, "calibrate", recorded)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"word " * 10}"}}\n' for _ in range(20)))
    header = open_checkpoint(str(tmp_path / "float"))
    load_model(header, device="cpu", quantization=f"gptq:{OPTIONS}", calibration=Calibration(text))
    bos = tokenizer.token_to_id("~")
    assert len(seen) == 4 and all(one[0] == bos and bos not in one[1:] and len(one) == 64 for one in seen)


def test_plans_of_calibrated_methods_need_no_text(tmp_path: Path, own_cache: Path) -> None:
    make(tmp_path / "float")
    plan = plan_model(open_checkpoint(str(tmp_path / "float")), quantization="marlin")
    scheme = {module.name: module for module in plan.modules}["model.layers.0.mlp.up_proj"]
    assert str(scheme.scheme) == "int4 1x128 f16" and scheme.error is not None and 0.05 < scheme.error < 0.2
    kept = {module.name: module.reason for module in plan.modules if module.scheme.is_dense}
    assert "group size 128 does not divide" in kept["model.layers.0.mlp.down_proj"]
    assert not own_cache.exists()


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    """FP8 blocks: what it reads without other packages."""
    # transformers takes whole blocks only.
    make(tmp_path / "float", intermediate_size=384, num_attention_heads=2, num_key_value_heads=1)
    with_tokenizer(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    load_model(header, device="cpu", quantization="fp8:weights=block", save=tmp_path / "fp8")
    config = FineGrainedFP8Config(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=config, dtype=torch.float32
    )
    mine = load_model(header, device="cpu", quantization="fp8:weights=block,activation=none", dtype="float32")
    with torch.no_grad():
        expected = theirs.float()(torch.tensor([PROMPT])).logits[0]
    got = prompt_logits(mine, [PROMPT])[0]
    assert (got - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize(("order", "bits"), [("true", 4), ("false", 8)])
def test_gptq_says_how_it_was_run(order: str, bits: int, tmp_path: Path) -> None:
    """In AutoGPTQ's place and GPTQModel's; columns lie as the inputs do, so that no tool looks for g_idx."""
    make(tmp_path / "float", LlamaForCausalLM)
    with_tokenizer(tmp_path / "float")
    method = f"gptq:{OPTIONS},group_size=32,act_order={order},bits={bits}"
    header = open_checkpoint(str(tmp_path / "float"))
    load_model(header, device="cpu", quantization=method, save=tmp_path / "saved")

    def said(folder: Path) -> dict:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert json.loads((folder / "quantize_config.json").read_text()) == config
        return config

    config = said(tmp_path / "saved")
    assert config["static_groups"] is True and config["desc_act"] is False
    assert config["meta"] == {
        "static_groups": True,
        "act_order": order == "true",
        "damp_percent": 0.05,
        "act_group_aware": False,
    }
    convert(open_checkpoint(str(tmp_path / "saved")), "gptq", tmp_path / "again")
    again = said(tmp_path / "again")
    assert again["static_groups"] is True and again["meta"]["static_groups"] is True


@pytest.mark.parametrize("method", ["rtn:group_size=32", f"gptq:{OPTIONS},group_size=32"])
def test_gguf_files_whose_folders_have_other_rows(method: str, tmp_path: Path) -> None:
    """GPT-NeoX: a head's Q, K and V in turn in folders, all Q first in GGUF files; the same model of both."""
    original = FIXTURES / "gguf_more_families" / "gpt_neox.gguf"
    convert(open_checkpoint(str(original)), "dense", tmp_path / "folder")
    text = tmp_path / "text.txt"
    text.write_text("the hour and the hinder of an ant in the house. " * 60)
    calibration = Calibration(text) if method.startswith("gptq") else None
    logits = []
    for number, source in enumerate((original, tmp_path / "folder")):
        out = tmp_path / str(number)
        load_model(
            open_checkpoint(str(source)),
            device="cpu",
            quantization=method,
            save=out,
            calibration=calibration,
        )
        loaded = load_model(open_checkpoint(str(out)), device="cpu", strict=True)
        logits.append(prompt_logits(loaded, [list(range(3, 10))])[0])
    assert torch.equal(*logits)


def test_calibration_of_what_folders_keep_apart_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "fused.gguf"
    fused("phi2", {"attn_qkv": ("attn_q", "attn_k", "attn_v")}, source)
    with pytest.raises(LowbitError, match=r"E0450.*q_proj lies in other tensors.*--format dense makes one"):
        load_model(
            open_checkpoint(str(source)), device="cpu", quantization=f"gptq:{OPTIONS}", save=tmp_path / "out"
        )


@pytest.mark.parametrize("method", ["gguf:type=q8_0", "int8"])
def test_another_tokenizer_is_saved_with_it(method: str, tmp_path: Path) -> None:
    """``--tokenizer`` beside ``--save-quantized``; a GGUF file cannot be without one."""
    original = FIXTURES / "gguf_more_families" / "gpt_neox.gguf"
    convert(open_checkpoint(str(original)), "dense", tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    load_model(
        open_checkpoint(str(tmp_path / "bare")),
        device="cpu",
        quantization=method,
        save=tmp_path / ("out.gguf" if method.startswith("gguf") else "out"),
        calibration=Calibration(tokenizer=str(original)),
    )
    [saved] = tmp_path.glob("out*")
    found, wanted = (load_tokenizer(open_checkpoint(str(path))) for path in (saved, original))
    assert found.encode("the hour and an ant") == wanted.encode("the hour and an ant")
