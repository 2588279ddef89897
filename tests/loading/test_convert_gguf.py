"""``lowbit convert --format gguf``: against the files of llama.cpp's converter, and the gguf package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from formats.helpers import FIXTURES
from formats.writing_cases import cruel, fixtures_it_takes, scheme
from forward_helpers import prompt_logits
from gguf_writing import GgufTensor, write_gguf
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.gguf_writer import GgufWriter, type_of
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme
from lowbit.tokenization import load_tokenizer
from models.family_cases import SIZES, check_logits, saved

GGUF = FIXTURES / "gguf_families"
MORE = FIXTURES / "gguf_more_families"
REFUSED = GGUF / "qwen3next.gguf"
FAMILIES = [path for path in sorted(GGUF.glob("*.gguf")) if path != REFUSED]
ROUNDED = MORE / "bitnet.gguf"  # whose weights the converter rounds to -1, 0 and 1 times a scale
MORE_FAMILIES = sorted(path.stem for path in MORE.glob("*.gguf") if path != ROUNDED)
# What the converter derives otherwise: names, counts and its own version; the vocabularies' pre-tokenizer.
OWN = (
    *("general.name", "general.file_type", "general.finetune", "general.basename"),
    *("general.version", "tokenizer.ggml.scores", "tokenizer.ggml.pre"),
)
# Keys that the converter writes otherwise, and why.
OTHERWISE = {
    "phi3_longrope": {"phi3.attention.sliding_window"},  # beyond the context, and left out
    "glm4moe": {"glm4moe.block_count", "glm4moe.nextn_predict_layers"},  # without those that predict
    "hunyuan_moe": {"tokenizer.ggml.seperator_token_id"},  # of the config, which the tokenizer has not
    "falcon_7b": {"falcon.context_length"},  # 2048 to the converter, whatever config.json says
    "falcon_40b": {"falcon.context_length"},
    # Those of layers it does not have, and a list for a number that is the same in all of them.
    "granite4": {
        *(f"granite.ssm.{key}" for key in ("conv_kernel", "state_size", "group_count", "inner_size")),
        *("granite.ssm.time_step_rank", "granite.attention.head_count_kv", "granite.rope.scaling.finetuned"),
        *("granite.expert_count", "granite.expert_used_count", "granite.expert_shared_feed_forward_length"),
    },
}


def fields(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}


def making_tokenizer(folder: Path) -> None:
    """The tokenizer of the fixtures beside a model that was saved without one."""
    convert(open_checkpoint(str(GGUF / "llama.gguf")), "dense", folder.parent / f"{folder.name}-llama")
    for path in (folder.parent / f"{folder.name}-llama").glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())


def check_keys(theirs: Path, mine: Path) -> None:
    """Every key of the converter's file, with its value; mine may have more, which readers do without."""
    wanted, found = fields(theirs), fields(mine)
    unlike = set()
    for key, value in wanted.items():
        alike = found.get(key) == value
        if isinstance(value, float) and isinstance(found.get(key), float):
            alike = found[key] == pytest.approx(value, rel=1e-6)
        if not alike and not key.startswith(OWN):
            unlike.add(key)
    assert unlike == OTHERWISE.get(theirs.stem, set())


def values_of(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def by_lowbit(path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    ids = load_file(tokens)["tokens"].flatten().tolist()
    [logits] = prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [ids])
    return logits


@pytest.mark.parametrize("original", [*FAMILIES, ROUNDED], ids=lambda path: path.stem)
def test_family_there_and_back(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF -> folder -> GGUF: the converter's tensors and keys, the values to the last bit."""
    out = tmp_path / "out.gguf"
    convert(open_checkpoint(str(original)), "dense", tmp_path / "folder")
    convert(open_checkpoint(str(tmp_path / "folder")), "gguf", out)
    before, after = values_of(original), values_of(out)
    assert before.keys() == after.keys()
    for tensor, wanted in before.items():
        found = after[tensor]
        assert wanted.shape == found.shape
        if tensor.startswith("rope_"):
            assert np.allclose(wanted, found, rtol=1e-6, atol=0), tensor
        elif original.stem.startswith("gemma") and tensor.endswith("norm.weight"):
            assert np.allclose(wanted, found, rtol=0, atol=2.0**-23), tensor  # 1 taken off, and added again
        else:
            assert np.array_equal(wanted, found), tensor
    check_keys(original, out)
    a, b = (by_lowbit(path, original.with_suffix(".safetensors"), monkeypatch) for path in (original, out))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    first, second = (load_tokenizer(open_checkpoint(str(path))) for path in (original, out))
    for text in ("the hour", " and  an", "hinder the ant\n"):
        assert first.encode(text) == second.encode(text)


@pytest.fixture(scope="module")
def making() -> ModuleType:
    """The script that made the files of more families: it makes their checkpoints anew."""
    spec = importlib.util.spec_from_file_location("making_more_families", MORE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_as_the_converter_writes_it(
    name: str, making: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that llama.cpp's converter made its file of: the same tensors, names, rows and keys."""
    folder, out, theirs = tmp_path / "folder", tmp_path / "out.gguf", MORE / f"{name}.gguf"
    folder.mkdir()
    making.build(name, folder)
    convert(open_checkpoint(str(folder)), "gguf", out)
    wanted, found = values_of(theirs), values_of(out)
    assert wanted.keys() == found.keys()
    for tensor, values in wanted.items():
        assert np.array_equal(values, found[tensor]), tensor
    check_keys(theirs, out)
    a, b = (by_lowbit(path, theirs.with_suffix(".safetensors"), monkeypatch) for path in (theirs, out))
    assert torch.equal(a, b)


MLA = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
SCALES = {"embedding_multiplier": 4.0, "residual_multiplier": 0.5, "logits_scaling": 1.5}
FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
PLAIN = {
    key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 131}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
THREE_QUARTERS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
SAVED: dict[str, dict[str, object]] = {
    "Qwen2Moe with yarn": SIZES
    | FOUR
    | {"num_experts": 4, "shared_expert_intermediate_size": 64, "rope_parameters": YARN},
    "Qwen3Moe": SIZES | FOUR | {"num_experts": 4, "norm_topk_prob": True},
    "Granite with biases": SIZES | SCALES | {"attention_bias": True, "mlp_bias": True},
    "GraniteMoe": SIZES | SCALES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": SIZES
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "Olmo2 with biases": SIZES | {"attention_bias": True},
    "Olmo2 with a tied head": SIZES | {"tie_word_embeddings": True},
    "Olmo3": SIZES | {"sliding_window": 20},
    "SmolLM3 with biases": SIZES | {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    "StableLm": SIZES | {"use_parallel_residual": True, "use_qkv_bias": True},
    "Cohere with biases": SIZES | {"use_qk_norm": True, "attention_bias": True},
    "Cohere2": SIZES | {"sliding_window": 20},
    "Glm4 with biases": SIZES | {"head_dim": 32, "attention_bias": True},
    "DeepseekV2": SIZES | MLA | {"q_lora_rank": 32, "topk_method": "group_limited_greedy"},
    "DeepseekV3": SIZES | MLA | {"q_lora_rank": None},
    "Glm4Moe": SIZES
    | FOUR
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 2,
    },
    "GptOss": SIZES
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 20},
    "Exaone4": SIZES | {"sliding_window": 20, "sliding_window_pattern": 4},
    "Starcoder2 without biases": SIZES | {"use_bias": False},
    "Phi": SIZES,
    "Phi3 that turns three quarters": SIZES | {"rope_parameters": THREE_QUARTERS},
    "Falcon of 11B": PLAIN
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "Falcon with all heads": PLAIN | {"multi_query": False},
    "GPTNeoX": PLAIN | {"intermediate_size": 96, "rope_parameters": THREE_QUARTERS | {"rope_theta": 5e3}},
    "GPT2 with a head": GPT2 | {"n_inner": 96, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", SAVED)
def test_as_transformers_saves_it(case: str, tmp_path: Path) -> None:
    """Folder -> GGUF -> folder: transformers' logits from its own folder, in each."""
    oracle = saved(case.split()[0], tmp_path / "a", **SAVED[case])
    making_tokenizer(tmp_path / "a")
    convert(open_checkpoint(str(tmp_path / "a")), "gguf", tmp_path / "a.gguf")
    check_logits(tmp_path / "a.gguf", oracle)
    if "tied" in case:  # llama.cpp loads OLMo 2 with a head only
        values = values_of(tmp_path / "a.gguf")
        assert np.array_equal(values["output.weight"], values["token_embd.weight"])
    convert(open_checkpoint(str(tmp_path / "a.gguf")), "dense", tmp_path / "b")
    again, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(oracle) and not any(told.values()), told
    tokens = torch.arange(1, 100)[None]
    with torch.no_grad():
        wanted, found = oracle(tokens).logits, again(tokens).logits
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_yarn_in_the_words_of_llama_cpp(tmp_path: Path) -> None:
    """It multiplies its own factor by ``attn_factor``; bounds that are not rounded have no key."""
    yarn = YARN | {"attention_factor": 1.25}
    saved("Qwen2", tmp_path / "a", **SIZES | {"rope_parameters": yarn})
    making_tokenizer(tmp_path / "a")
    convert(open_checkpoint(str(tmp_path / "a")), "gguf", tmp_path / "a.gguf")
    told = fields(tmp_path / "a.gguf")
    assert told["qwen2.rope.scaling.yarn_attn_factor"] == 1.25
    own = 0.1 * np.log(4) + 1
    assert told["qwen2.rope.scaling.attn_factor"] * own == pytest.approx(1.25, rel=1e-6)
    saved("Qwen2", tmp_path / "b", **SIZES | {"rope_parameters": yarn | {"truncate": False}})
    making_tokenizer(tmp_path / "b")
    with pytest.raises(LowbitError, match="cannot say its rope_scaling.truncate False"):
        convert(open_checkpoint(str(tmp_path / "b")), "gguf", tmp_path / "b.gguf")


def test_both_chat_templates_there_and_back(tmp_path: Path) -> None:
    """That of requests with tools is a file of its own in folders, and a key of its own in GGUF files."""
    saved("Qwen2", tmp_path / "a", **SIZES)
    making_tokenizer(tmp_path / "a")
    tools = "additional_chat_templates/tool_use.jinja"
    texts = {"chat_template.jinja": "{{ messages }}", tools: "{{ tools }}"}
    (tmp_path / "a" / tools).parent.mkdir()
    for name, text in texts.items():
        (tmp_path / "a" / name).write_text(text)
    convert(open_checkpoint(str(tmp_path / "a")), "gguf", tmp_path / "a.gguf")
    told = fields(tmp_path / "a.gguf")
    assert told["tokenizer.chat_template"] == "{{ messages }}"
    assert told["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert told["tokenizer.chat_templates"] == ["tool_use"]
    for source, out in (("a", "b"), ("a.gguf", "c")):
        convert(open_checkpoint(str(tmp_path / source)), "dense", tmp_path / out)
        assert {name: (tmp_path / out / name).read_text() for name in texts} == texts


def fused(name: str, groups: dict[str, tuple[str, ...]], out: Path) -> None:
    """A converter's file with some modules of each block one below another, as other converters have them."""
    [path] = FIXTURES.glob(f"gguf*families/{name}.gguf")
    header = open_checkpoint(str(path))
    values = {tensor: torch.from_numpy(array.copy()) for tensor, array in values_of(path).items()}
    for tensor in list(values):
        for whole, (first, *others) in groups.items():
            if f".{first}." in tensor:
                rest = [values.pop(tensor.replace(first, other)) for other in others]
                values[tensor.replace(first, whole)] = torch.cat(
                    [values.pop(tensor), *rest], -2 if "weight" in tensor else 0
                )
    tensors = [
        GgufTensor(n, "F32", tuple(v.shape), v.float().contiguous().numpy().tobytes())
        for n, v in values.items()
    ]
    write_gguf(out, header.metadata, tensors)


def cut(name: str, whole: str, stems: tuple[str, ...], rows: tuple[int, ...], out: Path) -> None:
    """The other way round."""
    [path] = FIXTURES.glob(f"gguf*families/{name}.gguf")
    tensors = []
    for tensor, array in values_of(path).items():
        pieces = {tensor: torch.from_numpy(array.copy()).float()}
        if f".{whole}." in tensor:
            split = pieces.pop(tensor).split(rows)
            pieces = {tensor.replace(whole, stem): piece for stem, piece in zip(stems, split, strict=True)}
        tensors += [
            GgufTensor(n, "F32", tuple(v.shape), v.contiguous().numpy().tobytes()) for n, v in pieces.items()
        ]
    write_gguf(out, open_checkpoint(str(path)).metadata, tensors)


QKV = ("attn_q", "attn_k", "attn_v")
GATE_UP = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
OTHER_CUTS = {
    "phi2": lambda out: fused("phi2", {"attn_qkv": QKV}, out),
    "chatglm": lambda out: fused("chatglm", {"attn_qkv": QKV}, out),
    "qwen3moe": lambda out: fused("qwen3moe", GATE_UP, out),
    "granitemoe": lambda out: fused("granitemoe", GATE_UP, out),
    "falcon_40b": lambda out: cut("falcon_40b", "attn_qkv", QKV, (32, 16, 16), out),
    "gpt_neox": lambda out: cut("gpt_neox", "attn_qkv", QKV, (32, 32, 32), out),
    "phi3": lambda out: cut("phi3", "ffn_up", ("ffn_gate", "ffn_up"), (64, 64), out),
}


@pytest.mark.parametrize("name", OTHER_CUTS)
def test_other_cuts_give_the_same_folder(name: str, tmp_path: Path) -> None:
    """Whether a GGUF file keeps Q, K and V, or gate and up, in one tensor or apart: the family's folder."""
    [path] = FIXTURES.glob(f"gguf*families/{name}.gguf")
    OTHER_CUTS[name](tmp_path / "other.gguf")
    convert(open_checkpoint(str(path)), "dense", tmp_path / "a", dtype="f32")
    convert(open_checkpoint(str(tmp_path / "other.gguf")), "dense", tmp_path / "b", dtype="f32")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert a.keys() == b.keys()
    for tensor, values in a.items():
        assert torch.equal(values, b[tensor]), tensor


def test_fused_rows_of_rotary_pairs_are_refused(tmp_path: Path) -> None:
    """Llama's Q and K lie in another order in GGUF files: nobody writes them in one tensor with V."""
    fused("llama", {"attn_qkv": QKV}, tmp_path / "fused.gguf")
    with pytest.raises(LowbitError, match=r"E0241.*'blk\.0\.attn_qkv' holds Q, K and V in one tensor"):
        load_model(open_checkpoint(str(tmp_path / "fused.gguf")), device="cpu")


def test_stacks_of_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: stacks of gate and up rows in turn and back, the converter's own bytes."""
    original, out = GGUF / "gpt_oss.gguf", tmp_path / "out.gguf"
    convert(open_checkpoint(str(original)), "mxfp4", tmp_path / "folder")
    convert(open_checkpoint(str(tmp_path / "folder")), "gguf", out)
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (original, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type and np.array_equal(tensor.data, after[name].data)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_latent_attention_in_one_matrix(name: str, tmp_path: Path) -> None:
    """Files of earlier converters have kv_b_proj whole: the same folder."""
    path = GGUF / f"{name}.gguf"
    tensors = []
    values = {key: torch.from_numpy(array.copy()).float() for key, array in values_of(path).items()}
    for key, tensor in values.items():
        if ".attn_k_b." in key:
            v = values[key.replace("_k_b", "_v_b")]
            whole = torch.cat([tensor.transpose(1, 2), v], 1).flatten(0, 1).contiguous()
            tensors.append((key.replace("_k_b", "_kv_b"), whole))
        elif ".attn_v_b." not in key:
            tensors.append((key, tensor))
    made = [GgufTensor(key, "F32", tuple(t.shape), t.contiguous().numpy().tobytes()) for key, t in tensors]
    write_gguf(tmp_path / "old.gguf", open_checkpoint(str(path)).metadata, made)
    convert(open_checkpoint(str(path)), "dense", tmp_path / "a", dtype="f32")
    convert(open_checkpoint(str(tmp_path / "old.gguf")), "dense", tmp_path / "b", dtype="f32")
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def latent_halves(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What llama.cpp's converter makes of the second layer's kv_b_proj: K's rows turned, V's as they are."""
    model = SourceModel(open_checkpoint(str(folder)))
    [module] = [one for one in model.modules if one.place.part.name == "model.layers.1.self_attn.kv_b_proj"]
    with TensorData(model.header) as data:
        whole = model.read(module, data).weight.dequantize().view(4, -1, 32)
    return whole[:, :32].transpose(1, 2), whole[:, 32:]


def test_latent_attention_of_quantized_folders(tmp_path: Path) -> None:
    """V's half keeps its blocks; K's lies along the other axis and is plain, to the last bit, and this is
    said."""
    convert(open_checkpoint(str(GGUF / "deepseek3.gguf")), "dense", tmp_path / "a", dtype="f32")
    header = open_checkpoint(str(tmp_path / "a"))
    convert(
        header, "compressed-tensors", tmp_path / "b", requantize="rtn:bits=4,group_size=32,symmetric=true"
    )
    scales = [
        (path, tensors)
        for path in (tmp_path / "b").glob("*.safetensors")
        if (tensors := load_file(path)).keys()
    ]
    for path, tensors in scales:  # scales that GGUF's f16 holds
        rounded = {n: t.half().float() if "scale" in n else t for n, t in tensors.items()}
        save_file(rounded, path, {"format": "pt"})
    done = convert(open_checkpoint(str(tmp_path / "b")), "gguf", tmp_path / "b.gguf")
    assert [
        note for note in done.notes if note.startswith("2 modules like model.layers.0.self_attn.k_b_proj")
    ]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert tensors["blk.1.attn_k_b.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.attn_v_b.weight"].tensor_type.name == "Q4_0"
    found, wanted = values_of(tmp_path / "b.gguf"), latent_halves(tmp_path / "b")
    for half, values in zip("kv", wanted, strict=True):
        assert np.array_equal(found[f"blk.1.attn_{half}_b.weight"], values.numpy())
    # And back: of the two halves, one of them plain, one plain matrix.
    done = convert(open_checkpoint(str(tmp_path / "b.gguf")), "gptq", tmp_path / "c")
    assert [
        note for note in done.notes if note.startswith("2 modules like model.layers.0.self_attn.kv_b_proj")
    ]
    for half, values in zip(latent_halves(tmp_path / "c"), wanted, strict=True):
        assert torch.equal(half, values)


def test_latent_attention_in_blocks_of_rows(tmp_path: Path) -> None:
    """What neither half can keep: FP8 in blocks whose rows do not move. Both are made anew."""
    convert(open_checkpoint(str(GGUF / "deepseek3.gguf")), "dense", tmp_path / "a", dtype="f32")
    convert(open_checkpoint(str(tmp_path / "a")), "fp8", tmp_path / "b", requantize="fp8:weights=block")
    header = open_checkpoint(str(tmp_path / "b"))
    with pytest.raises(LowbitError, match="cannot be written without"):
        convert(header, "gguf", tmp_path / "b.gguf")
    convert(header, "gguf", tmp_path / "b.gguf", requantize="gguf:type=q8_0")
    found = values_of(tmp_path / "b.gguf")
    for half, values in zip("kv", latent_halves(tmp_path / "b"), strict=True):
        far = np.abs(found[f"blk.1.attn_{half}_b.weight"] - values.numpy()).max()
        assert far <= 2**-7 * float(values.abs().max())


def test_norms_of_each_head(tmp_path: Path) -> None:
    """StableLM 2 12B: a norm for each head in folders, one tensor (heads, head_dim) in GGUF files."""
    oracle = saved("StableLm", tmp_path / "a", **SIZES, qk_layernorm=True, use_parallel_residual=True)
    for number in ("a", "b"):
        making_tokenizer(tmp_path / number)
        convert(open_checkpoint(str(tmp_path / number)), "gguf", tmp_path / f"{number}.gguf")
        check_logits(tmp_path / f"{number}.gguf", oracle)
        if number == "a":
            convert(open_checkpoint(str(tmp_path / "a.gguf")), "dense", tmp_path / "b")
    names = [set(load_file(tmp_path / n / "model.safetensors")) for n in "ab"]
    assert names[0] == names[1]
    assert values_of(tmp_path / "a.gguf")["blk.0.attn_q_norm.weight"].shape == (4, 16)


@pytest.mark.parametrize(
    ("kind", "changes", "lost"),
    [
        ("Qwen2Moe", {"norm_topk_prob": True}, "moe.renormalize"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "moe.renormalize"),
        ("Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "moe.layers"),
        ("Qwen2", {"hidden_act": "gelu"}, "activation"),
        ("SmolLM3", {"no_rope_layers": [0, 1, 1, 1]}, "unrotated"),
        ("Cohere2", {"layer_types": ["sliding_attention", "full_attention"] * 2}, "windows"),
        ("Cohere2", {"layer_types": ["full_attention"] * 4}, "attention.sliding_window"),
        ("GPT2", {"activation_function": "relu"}, "activation"),
        ("DeepseekV3", {"rope_interleave": False}, "rotates_neighbours"),
        (
            "DeepseekV3",
            {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
            "rope_scaling.mscale",
        ),
    ],
)
def test_what_metadata_cannot_say(kind: str, changes: dict[str, object], lost: str, tmp_path: Path) -> None:
    small = SIZES | {"num_experts": 4, "num_experts_per_tok": 2} if kind.endswith("Moe") else SIZES
    small = {"GPT2": GPT2, "DeepseekV3": SIZES | MLA}.get(kind, small)
    saved(kind, tmp_path / "folder", **small | changes)
    making_tokenizer(tmp_path / "folder")
    with pytest.raises(LowbitError, match=rf"E0450.*cannot say .*{lost}"):
        convert(open_checkpoint(str(tmp_path / "folder")), "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


CASES = [
    (scheme("int4", (1, 32)), "Q4_0"),
    (scheme("int4", (1, 64)), "Q4_0"),
    (scheme("int4", (1, 0)), "Q4_0"),
    (scheme("int5", (1, 32)), "Q5_0"),
    (scheme("int8", (1, 96)), "Q8_0"),
    (scheme("int8", (0, 0)), "Q8_0"),
    (scheme("e2m1", (1, 32), scales="e8m0"), "MXFP4"),
]


@pytest.mark.parametrize(("made", "kind"), CASES, ids=str)
def test_blocks_by_the_gguf_package(made: Scheme, kind: str) -> None:
    """The package's own decoder on what was written: the same numbers."""
    weight = cruel(made, (5, 192))
    assert GgufWriter.refuses_to_write(made, (5, 192)) is None and type_of(made) == kind
    tensors = GgufWriter({"x": made}).write(StoredModule("x", "x", (5, 192)), weight)
    found = gguf.quants.dequantize(tensors["x.weight"].numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, weight.dequantize().numpy())


def test_nvfp4() -> None:
    made = scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32")
    weight = cruel(made, (5, 192))
    tensors = GgufWriter({"x": made}).write(StoredModule("x", "x", (5, 192)), weight)
    layout = number_format("gguf_nvfp4").block
    assert layout is not None
    found = layout.decode(tensors["x.weight"].unflatten(-1, (-1, layout.bytes))).flatten(-2)
    assert torch.allclose(found * tensors["x.scale"], weight.dequantize(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("uint4", (1, 32), zero=True), "zero points"),
        (scheme("int4", (1, 48)), "whole blocks of 32"),
        (scheme("int4", (1, 32), reordered=True), "act-order"),
        (scheme("int3", (1, 32)), "no block type"),
        (scheme("int8", (1, 0), activation=ActivationScheme(number_format("int8"), (1, 0))), "inputs"),
        (scheme("e2m1", (1, 16), (0, 0), scales="e4m3 f32"), "blocks of 64"),
    ],
    ids=str,
)
def test_refusals(made: Scheme, reason: str) -> None:
    assert reason in (GgufWriter.refuses_to_write(made, (8, 96)) or "")


def test_scales_that_are_no_f16() -> None:
    made = scheme("int4", (1, 32), scales="f32")
    weight = cruel(made, (4, 64))
    with pytest.raises(LowbitError, match="f32 scales are not exact in f16"):
        GgufWriter({"x": made}).write(StoredModule("x", "x", (4, 64)), weight)
    halves = QuantizedTensor(made, (4, 64), weight.codes, (weight.scales[0].half().float(),))
    assert GgufWriter({"x": made}).write(StoredModule("x", "x", (4, 64)), halves)


@pytest.mark.parametrize(
    "folder",
    fixtures_it_takes(GgufWriter, "gptq", "compressed_tensors", "auto_round", "mxfp4"),
    ids=lambda f: f"{f.parent.name}-{f.name}",
)
def test_quantized_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module's numbers, read from the file by lowbit: rows of Q and K back in their order."""
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}  # the fixtures have none
    monkeypatch.setattr("lowbit.loading.gguf_saving.tokenizer_metadata", lambda header, rows: tokens)
    try:
        convert(open_checkpoint(str(folder)), "gguf", tmp_path / "out.gguf")
    except LowbitError as error:
        assert "not exact in f16" in error.message, error.message
        return
    before, after = (SourceModel(open_checkpoint(str(p))).for_gguf() for p in (folder, tmp_path / "out.gguf"))
    theirs = {module.place.part.name: module for module in after.modules}
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for module in before.modules:
            a = before.read(module, old).weight.dequantize()
            b = after.read(theirs[module.place.part.name], new).weight.dequantize()
            assert torch.equal(a, b), module.target.name


def test_missing_package_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = open_checkpoint(str(GGUF / "llama.gguf"))
    convert(header, "dense", tmp_path / "folder")
    folder = open_checkpoint(str(tmp_path / "folder"))
    with pytest.raises(LowbitError, match="one file; name it out.gguf"):
        convert(folder, "gguf", tmp_path / "out")
    with pytest.raises(LowbitError, match="is a GGUF file already"):
        convert(header, "gguf", tmp_path / "out.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[gguf\]'") as caught:
        convert(folder, "gguf", tmp_path / "out.gguf")
    assert caught.value.code == "E0451"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize(("form", "kinds"), [("compressed-tensors", {"Q8_0"}), ("gptq", {"Q8_0", "F32"})])
def test_simple_blocks_in_other_formats(form: str, kinds: set[str], tmp_path: Path) -> None:
    """A Q8_0 file as groups of 32: the numbers of every matrix; embeddings plain where they must be."""
    header = open_checkpoint(str(GGUF / "mistral.gguf"))
    convert(header, form, tmp_path / "out")
    before, after = SourceModel(header), SourceModel(open_checkpoint(str(tmp_path / "out")), strict=True)
    found = set()
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for one, other in zip(before.modules, after.modules, strict=True):
            a, b = before.read(one, old).weight, after.read(other, new).weight
            assert torch.equal(a.dequantize(), b.dequantize()), one.target.name
            found.add("F32" if b.scheme.is_dense else "Q8_0")
    assert found == kinds


def test_what_has_offsets_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be written without"):
        convert(open_checkpoint("smollm2"), "gptq", tmp_path / "out")
    assert not list(tmp_path.iterdir())
