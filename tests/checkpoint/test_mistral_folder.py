"""Mistral's own layout (params.json, consolidated.safetensors): the same model as the Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tiny import HEADS, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.mistral_folder import config_of
from lowbit.errors import LowbitError
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.models.registry import family_of
from lowbit.tokenization import load_tokenizer

PARAMS = {
    "dim": 64,
    "n_layers": 1,
    "head_dim": 32,
    "hidden_dim": 96,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 40,
    "rope_theta": 10000.0,
    "max_seq_len": 128,
}
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "layers.0.attention_norm",
    "model.layers.0.post_attention_layernorm": "layers.0.ffn_norm",
    **{f"model.layers.0.self_attn.{name}_proj": f"layers.0.attention.w{name}" for name in "qkvo"},
    "model.layers.0.mlp.gate_proj": "layers.0.feed_forward.w1",
    "model.layers.0.mlp.down_proj": "layers.0.feed_forward.w2",
    "model.layers.0.mlp.up_proj": "layers.0.feed_forward.w3",
}
PROMPT = [[3, 1, 4, 1, 5, 9, 2, 6]]


def side_by_side(weight: Tensor) -> Tensor:
    """Rows as Meta has them: the two that rotate together in turn (the inverse of transformers' permute)."""
    out, columns = weight.shape
    return weight.view(HEADS, 2, out // HEADS // 2, columns).transpose(1, 2).reshape(out, columns)


def written(folder: Path, params: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "consolidated.safetensors")
    return folder


def mistral_tensors(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in plain.items():
        rotates = name.endswith(("q_proj.weight", "k_proj.weight"))
        stored = NAMES[name.removesuffix(".weight")] + ".weight"
        found[stored] = side_by_side(tensor) if rotates else tensor
    return found


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "plain")


@pytest.fixture
def folder(tmp_path: Path, plain: Path) -> Path:
    return written(tmp_path / "own", PARAMS, mistral_tensors(load_file(plain / "model.safetensors")))


def test_the_same_logits(folder: Path, plain: Path) -> None:
    ours = load_model(open_checkpoint(str(folder), load_format="mistral"), device="cpu")
    wanted = load_model(open_checkpoint(str(plain)), device="cpu")
    assert torch.equal(prompt_logits(ours, PROMPT)[0], prompt_logits(wanted, PROMPT)[0])


def test_config_json_beside_consolidated_files(folder: Path, plain: Path) -> None:
    (folder / "config.json").write_text((plain / "config.json").read_text())
    assert open_checkpoint(str(folder)).rotary_pairs
    save_file(load_file(plain / "model.safetensors"), folder / "model.safetensors")
    header = open_checkpoint(str(folder))
    assert not header.rotary_pairs and header.file_of("model.norm.weight") == "model.safetensors"


def test_converting_gives_the_plain_folder(folder: Path, plain: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(str(folder)), "dense", tmp_path / "out")
    written_back = load_file(tmp_path / "out" / "model.safetensors")
    for name, wanted in load_file(plain / "model.safetensors").items():
        assert torch.equal(written_back[name], wanted), name


@pytest.mark.parametrize("moe", [{}, {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}])
@pytest.mark.parametrize("said", [{}, {"sliding_window": None}, {"sliding_window": 16}])
def test_a_window_is_what_params_json_says(said: dict, moe: dict, folder: Path) -> None:
    """transformers takes 4,096 where config.json has no such key; Mistral's own layout has none there."""
    (folder / "params.json").write_text(json.dumps(PARAMS | said | moe))
    header = open_checkpoint(str(folder))
    assert family_of(header).config_of(header).windows == ((16,) if said.get("sliding_window") else ())


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [([16], (16,) * 4), ([None, 16], (0, 16, 0, 16)), ([None, 16, 16, 16], (0, 16, 16, 16)), ([None], ())],
)
def test_windows_in_turns(pattern: list, windows: tuple[int, ...]) -> None:
    """As mistral-inference repeats them; transformers' class for them is Ministral's."""
    config = config_of(PARAMS | {"n_layers": 4, "sliding_window": pattern})
    header = CheckpointHeader(Path("x"), "safetensors", {}, config)
    assert family_of(header).config_of(header).windows == windows
    assert (config["architectures"] == ["MinistralForCausalLM"]) is bool(windows)


@pytest.mark.parametrize("pattern", [[], [None, 16, 16], [None, 16, 8, 16], [None, "a"], [{}, []]])
def test_windows_that_are_no_pattern(pattern: list) -> None:
    with pytest.raises(LowbitError, match=r"E0218|E0216"):
        config = config_of(PARAMS | {"n_layers": 4, "sliding_window": pattern})
        header = CheckpointHeader(Path("x"), "safetensors", {}, config)
        family_of(header).config_of(header)


def test_converting_says_that_there_is_no_window(folder: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(str(folder)), "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sliding_window" in config and config["sliding_window"] is None


@pytest.mark.parametrize(
    ("said", "theta"), [({}, 1e6), ({"sliding_window": 16}, 1e4), ({"rope_theta": 5.0}, 5.0)]
)
def test_the_rotary_base_where_params_json_has_none(said: dict, theta: float, folder: Path) -> None:
    params = {key: value for key, value in PARAMS.items() if key != "rope_theta"}
    (folder / "params.json").write_text(json.dumps(params | said))
    header = open_checkpoint(str(folder))
    assert family_of(header).config_of(header).rope_theta == theta


def test_fp8_with_a_scale_for_each_tensor(folder: Path, plain: Path, tmp_path: Path) -> None:
    tensors, dense = load_file(folder / "consolidated.safetensors"), load_file(plain / "model.safetensors")
    for name in list(tensors):
        if ".attention.w" not in name and ".feed_forward.w" not in name:
            continue
        stem, scale = name.removesuffix(".weight"), tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{stem}.qscale_weight": scale, f"{stem}.qscale_act": torch.tensor(0.02)}
        [hf] = [hf for hf, own in NAMES.items() if own == stem]
        weight = (dense[f"{hf}.weight"] / scale).to(torch.float8_e4m3fn)
        dense |= {
            f"{hf}.weight": weight,
            f"{hf}.weight_scale": scale,
            f"{hf}.input_scale": torch.tensor(0.02),
        }
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    own = written(tmp_path / "fp8", PARAMS | {"quantization": quantization}, tensors)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dense, plain / "model.safetensors")
    ours, wanted = (load_model(open_checkpoint(str(path)), device="cpu") for path in (own, plain))
    assert torch.equal(prompt_logits(ours, PROMPT)[0], prompt_logits(wanted, PROMPT)[0])


def test_a_mixture_of_experts_gets_mixtrals_names(folder: Path) -> None:
    tensors = load_file(folder / "consolidated.safetensors")
    for leaf in ("w1", "w2", "w3"):
        weight = tensors.pop(f"layers.0.feed_forward.{leaf}.weight")
        tensors |= {f"layers.0.feed_forward.experts.{n}.{leaf}.weight": weight + n for n in range(4)}
    tensors["layers.0.feed_forward.gate.weight"] = torch.randn(4, 64)
    written(folder, PARAMS | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}, tensors)
    model = load_model(open_checkpoint(str(folder)), device="cpu")
    assert prompt_logits(model, PROMPT)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"yarn": {"factor": 4}}, "asks for 'yarn'"),
        ({"use_biases": True}, "asks for 'use_biases'"),
        ({"moe": {"num_experts": 4}}, "moe must say"),
        ({"moe": 3}, "moe must say"),
        ({"quantization": {"qformat_weight": "int4"}}, "qformat_weight fp8_e4m3"),
        ({"quantization": []}, "qformat_weight fp8_e4m3"),
        ({"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": []}}, "qformat_weight fp8_e4m3"),
        ({"vision_encoder": {}}, "asks for 'vision_encoder'"),
    ],
)
def test_what_params_json_may_not_ask(change: dict, said: str, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(LowbitError, match=said) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == "E0218" and "params.json" in str(caught.value)


def test_sizes_are_checked_where_configs_are(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_heads": "two"}))
    with pytest.raises(LowbitError) as caught:
        load_model(open_checkpoint(str(folder)), device="cpu")
    assert caught.value.code == "E0216"


def test_its_tokenizer_is_read(folder: Path) -> None:
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(LowbitError, match=r"tekken.json: no config"):
        load_tokenizer(open_checkpoint(str(folder)))
