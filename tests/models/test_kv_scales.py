"""Scales of the fp8 KV cache: every spelling, --quantization-param-path, and that they are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.load import load_engine
from lowbit.errors import LowbitError
from lowbit.formats.kv_scales import wants_fp8_cache
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.loading import load_model, plan_model
from lowbit.models.model import Model
from lowbit.numerics.cache_format import STATIC_E4M3, KvDtype
from lowbit.settings import Settings

LAYERS = 2
TOKENS = torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def with_tensors(plain: Path, folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    stored = load_file(plain / "model.safetensors")
    save_file({**stored, **tensors}, folder / "model.safetensors")
    written = {**json.loads((plain / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def scales(*suffixes: str) -> dict[str, Tensor]:
    """A scale of its own for each layer and name."""
    return {
        f"model.layers.{layer}.self_attn.{suffix}": torch.tensor(
            0.01 * (1 + layer) * (2 if "v" in suffix else 1)
        )
        for layer in range(LAYERS)
        for suffix in suffixes
    }


def loaded(folder: Path, cache: str = "fp8_e4m3", file: Path | None = None) -> Model:
    path = None if file is None else str(file)
    return load_model(open_checkpoint(str(folder)), device="cpu", kv_cache_dtype=cache, kv_scales_path=path)


SPELLINGS = {
    "compressed-tensors": (("k_scale", "v_scale"), [(0.01, 0.02), (0.02, 0.04)]),
    "modelopt": (("k_proj.k_scale", "v_proj.v_scale"), [(0.01, 0.02), (0.02, 0.04)]),
    "quark": (
        ("k_proj.output_scale", "v_proj.output_scale", "prob_output_scale"),
        [(0.01, 0.02), (0.02, 0.04)],
    ),
    "runtime": (("attn.k_scale", "attn.v_scale"), [(0.01, 0.02), (0.02, 0.04)]),
    "autofp8": (("kv_scale",), [(0.02, 0.02), (0.04, 0.04)]),
    "only k": (("k_scale",), [(0.01, 0.01), (0.02, 0.02)]),
    "none": ((), [(1.0, 1.0), (1.0, 1.0)]),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case: str, plain: Path, tmp_path: Path) -> None:
    suffixes, wanted = SPELLINGS[case]
    model = loaded(with_tensors(plain, tmp_path, scales(*suffixes)))
    found = [scale for block in model.blocks for scale in (block.k_scale, block.v_scale)]
    assert found == pytest.approx([scale for pair in wanted for scale in pair])
    plan = plan_model(open_checkpoint(str(tmp_path)), device="cpu", kv_cache_dtype="fp8_e4m3")
    assert plan.cache_specs == model.cache_specs()  # every scale has a place in the plan too
    dynamic = {spec.dtype.k.dynamic for spec in model.cache_specs()}
    assert dynamic == {not suffixes}, "without scales every token has its own, not 1"


def test_they_are_used(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as K and V rounded to e4m3 steps of their scale beside a float32 cache."""
    model = loaded(with_tensors(plain, tmp_path, scales("k_scale", "v_scale")))
    [native] = prompt_logits(model, [TOKENS])
    monkeypatch.setattr("lowbit.kernels.attention.attention_kernels", lambda: [ReferenceAttention()])
    [logits] = prompt_logits(model, [TOKENS])
    exact = loaded(plain, "f32")
    [unrounded] = prompt_logits(exact, [TOKENS])
    pairs = iter([(block.k_scale, block.v_scale) for block in model.blocks])
    write = ReferenceAttention.write

    def rounded(x: Tensor, scale: float) -> Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def spied(self: ReferenceAttention, cache: object, k: Tensor, v: Tensor, batch: object) -> None:
        k_scale, v_scale = next(pairs)
        write(self, cache, rounded(k, k_scale), rounded(v, v_scale), batch)

    monkeypatch.setattr(ReferenceAttention, "write", spied)
    [wanted] = prompt_logits(exact, [TOKENS])
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (unrounded - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (native - wanted).abs().max() <= 0.05 * wanted.abs().max(), "bfloat16 queries and weights"


def test_file_instead_of_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "scales.json"
    table = {"0": 0.5, "1": {"k": 0.25, "v": 2.0}}
    said = {"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": table}}}
    file.write_text(json.dumps(said))
    model = loaded(plain, file=file)
    assert [(block.k_scale, block.v_scale) for block in model.blocks] == [(0.5, 0.5), (0.25, 2.0)]
    assert not model.cache_specs()[0].dtype.k.dynamic
    header = open_checkpoint(str(plain))
    plan = plan_model(header, device="cpu", kv_cache_dtype="fp8_e4m3", kv_scales_path=str(file))
    assert plan.cache_specs == model.cache_specs()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"kv_cache": {"dtype": "float8_e5m2"}}, "dtype"),
        ({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 1.0}}}}, "layer 1 of 2"),
        ({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 1.0, "1": -1}}}}, "layer 1"),
        ({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {}, "1": {}}}}, "rank"),
    ],
)
def test_bad_files(change: dict, said: str, plain: Path, tmp_path: Path) -> None:
    good = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 1.0, "1": 1.0}}}
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"model_type": "llama", "kv_cache": good, **change}))
    with pytest.raises(LowbitError, match=said):
        loaded(plain, file=file)


def test_a_servers_settings_name_the_file(plain: Path, tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(64)}, "unk_token": "w0"}
    folder = with_tensors(plain, tmp_path, {})
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    table = {"0": 0.5, "1": 0.25}
    said = {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": table}}}
    (tmp_path / "scales.json").write_text(json.dumps(said))
    settings = Settings(
        model=str(folder),
        device="cpu",
        kv_cache_dtype="fp8_e4m3",
        quantization_param_path=str(tmp_path / "scales.json"),
        max_total_tokens=256,
    )
    model = load_engine(settings).model
    assert [block.k_scale for block in model.blocks] == [0.5, 0.25]


def test_missing_file(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="quantization-param-path"):
        loaded(plain, file=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("value", "code"),
    [(torch.tensor(float("nan")), "E0215"), (torch.tensor(0.0), "E0215"), (torch.ones(4), "E0218")],
)
def test_bad_scales(value: Tensor, code: str, plain: Path, tmp_path: Path) -> None:
    folder = with_tensors(plain, tmp_path, {"model.layers.0.self_attn.k_scale": value})
    with pytest.raises(LowbitError) as caught:
        loaded(folder)
    assert caught.value.code == code


def test_negative_means_never_calibrated(plain: Path, tmp_path: Path) -> None:
    """That layer's tokens have scales of their own; the other layer keeps the checkpoint's."""
    uncalibrated = {f"model.layers.0.self_attn.{name}_scale": torch.tensor(-1.0) for name in "kv"}
    model = loaded(with_tensors(plain, tmp_path, scales("k_scale", "v_scale") | uncalibrated))
    assert [(block.k_scale, block.v_scale) for block in model.blocks] == [
        (1.0, 1.0),
        (pytest.approx(0.02), pytest.approx(0.04)),
    ]
    assert [spec.dtype.k.dynamic for spec in model.cache_specs()] == [True, False]


@pytest.mark.parametrize("cache", ["f32", "fp8_e4m3"])
def test_scales_of_heads_give_way_to_those_of_tokens(cache: str, plain: Path, tmp_path: Path) -> None:
    """llm-compressor's ``attn_head``; its tensors are bfloat16 (heads, 1, 1)."""
    heads = {name: torch.full((2, 1, 1), 0.01).bfloat16() for name in scales("k_scale", "v_scale")}
    given = loaded(with_tensors(plain, tmp_path, heads), cache)
    plan = plan_model(open_checkpoint(str(tmp_path)), device="cpu", kv_cache_dtype=cache)
    assert plan.cache_specs == given.cache_specs()
    [logits], [wanted] = (prompt_logits(model, [TOKENS]) for model in (given, loaded(plain, cache)))
    assert torch.equal(logits, wanted)


def test_scales_are_for_e4m3_alone(plain: Path, tmp_path: Path) -> None:
    header = open_checkpoint(str(with_tensors(plain, tmp_path, scales("k_scale", "v_scale"))))
    model = load_model(header, device="cpu", kv_cache_dtype="fp8_e4m3", k_cache_dtype="int8")
    assert [block.k_scale for block in model.blocks] == [1.0, 1.0]
    assert [block.v_scale for block in model.blocks] == pytest.approx([0.02, 0.04])
    dtype = model.cache_specs()[0].dtype
    assert (dtype.k.name, dtype.k.dynamic, dtype.v.name, dtype.v.dynamic) == ("int8", True, "fp8_e4m3", False)


def test_zero_points_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = with_tensors(plain, tmp_path, {"model.layers.0.self_attn.k_zero_point": torch.tensor(1.0)})
    with pytest.raises(LowbitError, match="zero points"):
        loaded(folder)


def test_auto_follows_the_checkpoint(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True},
    }
    folder = with_tensors(plain, tmp_path, scales("k_scale", "v_scale"), quantization_config=quantization)
    assert loaded(folder, "auto").cache_specs()[0].dtype == KvDtype(STATIC_E4M3, STATIC_E4M3)
    assert loaded(folder, "bf16").cache_specs()[0].dtype == KvDtype.of("bf16")
    assert "kv-cache-dtype fp8_e4m3" in caplog.text


SCHEME = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
FOUR_BITS = SCHEME | {"num_bits": 4}
TENSORS = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}


@pytest.mark.parametrize(
    ("key", "config", "wanted"),
    [
        ("quantization_config", {**TENSORS, "kv_cache_scheme": SCHEME}, True),
        ("compression_config", {"quantization_config": {**TENSORS, "kv_cache_scheme": SCHEME}}, True),
        ("compression_config", {"quantization_config": {**TENSORS, "kv_cache_scheme": None}}, False),
        ("compression_config", {"quantization_config": {**TENSORS, "kv_cache_scheme": FOUR_BITS}}, False),
        ("quantization_config", {"quant_method": "fp8", "kv_cache_scheme": "static"}, True),
        ("quantization_config", {"quant_method": "fp8", "kv_cache_scheme": "dynamic"}, False),
        ("quantization_config", {"quant_method": "gptq", "kv_cache_scheme": "static"}, False),
    ],
)
def test_where_a_checkpoint_asks_for_an_fp8_cache(
    key: str, config: dict, wanted: bool, plain: Path, tmp_path: Path
) -> None:
    """A level deeper before November 2024; in AutoFP8's word."""
    folder = with_tensors(plain, tmp_path, {}, **{key: config})
    assert wants_fp8_cache(open_checkpoint(str(folder))) is wanted


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek whose latents are far from what e4m3 holds well without a scale."""
    folder = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(2)
    config = transformers.DeepseekV3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=128, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=LAYERS,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kv_a_layernorm" in name:
                parameter.uniform_(300, 900)
            elif "kv_b_proj" in name:
                parameter.normal_(0, 0.0005)
            elif "norm" not in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


LATENT_SCALES = [3.0, 7.0]


@pytest.mark.parametrize("source", ["checkpoint", "file"])
def test_used_on_latents(source: str, latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as latent rows rounded to e4m3 steps of K's scale beside a float32 cache."""
    monkeypatch.setattr("lowbit.kernels.attention.attention_kernels", lambda: [ReferenceAttention()])
    stem = "model.layers.{}.self_attn.{}_scale"
    both = {
        stem.format(layer, kind): torch.tensor(scale * factor)
        for layer, scale in enumerate(LATENT_SCALES)
        for kind, factor in (("k", 1.0), ("v", 5.0))  # V's has nothing to divide
    }
    if source == "checkpoint":
        model = loaded(with_tensors(latent, tmp_path, both))
    else:
        table = {str(layer): {"k": scale, "v": 99.0} for layer, scale in enumerate(LATENT_SCALES)}
        said = {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": table}}}
        (tmp_path / "scales.json").write_text(json.dumps(said))
        model = loaded(latent, file=tmp_path / "scales.json")
    [logits] = prompt_logits(model, [TOKENS])
    [unscaled] = prompt_logits(loaded(latent), [TOKENS])
    exact = loaded(latent, "f32")
    [unrounded] = prompt_logits(exact, [TOKENS])
    scales, write = iter(LATENT_SCALES), ReferenceAttention.write

    def spied(self: ReferenceAttention, cache: object, k: Tensor, v: Tensor, batch: object) -> None:
        scale = next(scales)
        write(self, cache, (k / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale, v, batch)

    monkeypatch.setattr(ReferenceAttention, "write", spied)
    [wanted] = prompt_logits(exact, [TOKENS])
    size = unrounded.abs().max()
    assert (logits - wanted).abs().max() <= 1e-4 * size
    assert (unrounded - wanted).abs().max() > 1e-3 * size
    assert (unscaled - wanted).abs().max() > 1e-3 * size, "without scales each token has its own"


def test_latents_in_other_dtypes_leave_scales_alone(latent: Path, tmp_path: Path) -> None:
    folder = with_tensors(latent, tmp_path, scales("k_scale", "v_scale"))
    first, second = (prompt_logits(loaded(path, "f32"), [TOKENS])[0] for path in (latent, folder))
    assert torch.equal(first, second)
