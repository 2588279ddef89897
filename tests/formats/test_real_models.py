"""Headers of real models in the layouts of real tools: planned strictly, and how they differ from each other.

``real_models`` has the widths, ``real_layouts`` what the tools store; the files are holes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.real_layouts import LAYOUTS, Layout, config_of, stored
from formats.real_models import MODELS, Entries, Model, model, write_holes
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import ModelPlan, plan_model

SOME_LAYOUTS, SOME_MODELS = ("gptq-order", "fp8-block", "exl3"), ("qwen2.5-0.5b", "qwen3-30b-a3b")
PAIRS = [(name, layout) for name in MODELS for layout in LAYOUTS]
FEW = [(name, layout) for name, layout in PAIRS if layout in SOME_LAYOUTS or name in SOME_MODELS]
# QuIP# has no Hadamard matrix of a multiple of 19, and stores Q, K and V fused under scales of each.
IMPOSSIBLE = {
    *((name, "quip_sharp") for name in ("qwen2.5-0.5b", "qwen3-4b", "phi3-mini", "deepseek-v2-lite")),
    # 10944 columns are 85.5 groups of 128.
    *(("deepseek-v2-lite", layout) for layout in ("awq", "awq-old", "quark-int4", "qqq")),
}


def plan(
    folder: Path,
    name: str,
    layout: str,
    change: Callable[[Entries, dict], object] = lambda tensors, config: None,
    strict: bool = True,
) -> ModelPlan:
    """The model in this layout, changed, as it would be loaded."""
    found, how = model(name), LAYOUTS[layout]
    tensors, config = stored(how, found), json.loads(json.dumps(config_of(how, found)))
    change(tensors, config)
    write_holes(folder, tensors, config, **how.documents(found))
    return plan_model(open_checkpoint(str(folder)), strict=strict)


def used(found: Model) -> list[str]:
    """The Linears the model runs: without those of prediction layers."""
    layers = found.config.get("text_config", found.config)["num_hidden_layers"]
    numbers = {name: re.search(r"layers\.(\d+)\.", name) for name in found.linears}
    return [name for name, number in numbers.items() if number and int(number[1]) < layers]


def check(name: str, layout: str, folder: Path) -> None:
    planned, found, how = plan(folder, name, layout), model(name), LAYOUTS[layout]
    quantized = [module for module in planned.modules if not module.scheme.is_dense]
    assert not any(module.kernel == "reference" for module in planned.modules)
    wanted = [name for name in used(found) if not how.skipped(name)]
    heads = 1 + any(key.endswith("lm_head.weight") for key in found.plain) if how.embedding else 0
    assert len(quantized) == len(wanted) + heads


@pytest.mark.parametrize(("name", "layout"), FEW)
def test_is_planned(name: str, layout: str, tmp_path: Path) -> None:
    if (name, layout) in IMPOSSIBLE:
        with pytest.raises(LowbitError, match="E02(09|13)"):
            check(name, layout, tmp_path)
        return
    check(name, layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [pair for pair in PAIRS if pair not in FEW])
def test_every_other_pair_is_planned(name: str, layout: str, tmp_path: Path) -> None:
    test_is_planned(name, layout, tmp_path)


# ---- transformers 5


def rope_parameters(tensors: Entries, config: dict) -> None:
    """dtype for torch_dtype, and one section for all of rope."""
    config["dtype"] = config.pop("torch_dtype")
    scaling = config.pop("rope_scaling", {"type": "default"})
    scaling["rope_type"] = scaling.pop("type")
    config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}


def rope_of_two_kinds(tensors: Entries, config: dict) -> None:
    """Gemma's: a section for each kind of layer."""
    rope_parameters(tensors, config)
    usual = config["rope_parameters"]
    local = usual | {"rope_theta": config.pop("rope_local_base_freq")}
    config["rope_parameters"] = {"full_attention": usual, "sliding_attention": local}
    config["layer_types"] = ["sliding_attention"]
    del config["sliding_window_pattern"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3-8b", rope_parameters),
        ("mixtral", rope_parameters),
        ("qwen3-30b-a3b", rope_parameters),
        ("deepseek-v3", rope_parameters),
        ("gemma3-1b", rope_of_two_kinds),
    ],
)
def test_configs_of_transformers_5_say_the_same(
    name: str, change: Callable[[Entries, dict], None], tmp_path: Path
) -> None:
    old, new = plan(tmp_path / "4", name, "awq"), plan(tmp_path / "5", name, "awq", change)
    assert old.config == new.config
    assert [module.scheme for module in old.modules] == [module.scheme for module in new.modules]


# ---- tensors that some tools add


@pytest.mark.parametrize(
    "extra",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.attn.v_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
        "model.layers.0.self_attn.q_proj.q_scale",
        "model.layers.0.self_attn.prob_scale",
    ],
)
@pytest.mark.parametrize("layout", ["ct-fp8", "quark-fp8"])
def test_tensors_nobody_needs(extra: str, layout: str, tmp_path: Path) -> None:
    plan(tmp_path, "llama3-8b", layout, lambda tensors, _: tensors.update({extra: ("F32", (1,))}))


# ---- heads


def quantized_head(layout: Layout, shape: tuple[int, int]) -> Callable[[Entries, dict], None]:
    def change(tensors: Entries, config: dict) -> None:
        tensors.pop("lm_head.weight", None)
        tensors.update({f"lm_head.{key}": entry for key, entry in layout.of(*shape).items()})
        said = config.get("quantization_config", {})
        for key in ("ignore", "llm_int8_skip_modules", "modules_to_not_convert"):
            if said.get(key):
                said[key] = [name for name in said[key] if name != "lm_head"]

    return change


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-4b"])
@pytest.mark.parametrize("layout", ["gptq", "awq", "ct-w4a16", "bnb", "exl2", "exl3", "fp8-static"])
def test_a_quantized_head(name: str, layout: str, tmp_path: Path) -> None:
    """Of a tied model too, whose config still says that the embedding is the head."""
    vocab = model(name).plain["model.embed_tokens.weight"][1]
    change = quantized_head(LAYOUTS[layout], (vocab[0], vocab[1]))
    planned = plan(tmp_path, name, layout, change)
    [head] = [module for module in planned.modules if "lm_head" in module.name]
    assert head.shape == vocab and not head.scheme.is_dense


# ---- parts that were left alone


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "fbgemm"])
def test_parts_that_were_left_alone(layout: str, tmp_path: Path) -> None:
    """K stays plain between Q and V, up beside gate: what the model fuses is of two kinds."""
    alone = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj")

    def change(tensors: Entries, config: dict) -> None:
        for name in alone:
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            tensors[f"{name}.weight"] = ("BF16", model("llama3-8b").linears[name])
        if layout == "bitnet":  # whose own weights may be floats: only the config tells them apart
            config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *alone]

    planned = plan(tmp_path, "llama3-8b", layout, change, strict=False)
    plain = {module.name for module in planned.modules if module.scheme.is_dense}
    assert plain >= set(alone) and len(plain) == len(alone) + 2 * (layout != "mlx")
