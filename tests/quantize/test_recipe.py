"""Recipes: which rule decides for a module, and every way of writing one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.quantize.recipe import Asked, Recipe, matches
from lowbit.quantize.specification import parse_method

Q, UP, DOWN = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj", "model.layers.13.mlp.down_proj"
EXPERT = "model.layers.3.mlp.experts.7.down_proj"
SHAPE = (64, 64)


@pytest.mark.parametrize(
    ("pattern", "name", "role", "expected"),
    [
        ("attention", Q, "linear", True),
        ("attention", UP, "linear", False),
        ("mlp", UP, "linear", True),
        ("mlp", EXPERT, "expert", False),
        ("experts", EXPERT, "expert", True),
        ("head", "lm_head", "head", True),
        ("head", UP, "linear", False),
        ("embedding", "model.embed_tokens", "embedding", True),
        ("*.self_attn.*", Q, "linear", True),
        ("*.self_attn", Q, "linear", False),
        ("re:.*layers\\.[0-3]\\..*", Q, "linear", True),
        ("re:.*layers\\.[0-3]", Q, "linear", False),
        ("layers.3", Q, "linear", True),
        ("layers.3", DOWN, "linear", False),  # 13 is not 3
        ("down_proj", EXPERT, "expert", True),
        ("proj", Q, "linear", False),
        ("qkv_proj", Q, "linear", True),
        ("*.gate_up_proj", UP, "linear", True),
        ("qkv_proj", "model.layers.3.self_attn.o_proj", "linear", False),
    ],
)
def test_patterns(pattern: str, name: str, role: str, expected: bool) -> None:
    assert matches(pattern, name, role) is expected


def test_the_first_rule_decides_and_the_default_takes_the_rest(tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text(
        """
        default = "fp8"
        [[rule]]
        modules = ["layers.0", "head"]
        quantization = "bf16"
        [[rule]]
        modules = "attention"
        quantization = "rtn"
        bits = 8
        group_size = -1
        [[rule]]
        modules = "experts"
        quantization = "mxfp4"
        [[rule]]
        modules = "*.down_proj"
        quantization = "keep"
        """
    )
    recipe = Recipe.from_file(tmp_path / "mixed.toml", ["layers.5"])

    def verdict(name: str, role: str = "linear") -> tuple[str | None, str]:
        found = recipe.verdict(name, role, SHAPE)
        return (found.method.key if found.method else None), found.dtype

    assert verdict("model.layers.0.self_attn.q_proj") == (None, "bf16")
    assert verdict("lm_head", "head") == (None, "bf16")
    assert verdict(Q) == ("rtn bits=8 group_size=-1 symmetric=False", "")
    assert verdict(EXPERT, "expert") == ("mxfp4 activation=none", "")
    assert verdict(DOWN) == (None, "")
    assert verdict(UP) == ("fp8 amax=max history=1024 margin=0 weights=channel", "")
    assert verdict("model.layers.5.mlp.up_proj") == (None, "")
    assert verdict("model.embed_tokens", "embedding") == (None, "")
    assert verdict("model.layers.3.mlp.gate", "router") == (None, "")
    assert [method.name for method in recipe.methods] == ["rtn", "mxfp4", "fp8"]


def test_what_is_never_quantized_unasked() -> None:
    recipe = Recipe.of(parse_method("int4"))
    assert recipe.verdict("lm_head", "head", SHAPE).method is None
    assert "router" in recipe.verdict("model.layers.0.mlp.gate", "router", SHAPE).reason
    assert "tiny" in recipe.verdict("model.layers.0.mlp.shared_gate", "linear", (1, 64)).reason
    assert "tiny" in recipe.verdict("model.layers.0.mlp.up_proj", "linear", (64, 16)).reason
    assert Recipe.of(parse_method("gguf")).verdict("lm_head", "head", SHAPE).method is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("defualt = 'fp8'", "unknown key 'defualt'; known here: default, rule"),
        ("", "says nothing"),
        ("default = 8", "default must be a method's name"),
        ("default = 'auto'", "auto chooses for a whole model"),
        ("rule = 3", "rules are tables"),
        ("[[rule]]\nquantization = 'fp8'", "rule 1: needs modules"),
        ("[[rule]]\nmodules = []\nquantization = 'fp8'", "rule 1: needs modules"),
        ("[[rule]]\nmodules = 'mlp'", "rule 1: needs quantization"),
        ("[[rule]]\nmodules = 're:('\nquantization = 'fp8'", "rule 1: pattern 're:('"),
        ("[[rule]]\nmodules = ''\nquantization = 'fp8'", "a pattern of modules is empty"),
        (
            "[[rule]]\nmodules = 'mlp'\nquantization = 'keep'\nbits = 4",
            "unknown key 'bits'; known here: none",
        ),
        ("[[rule]]\nmodules = 'mlp'\nquantization = 'rtn:bits=3'\nbits = 4", "use one place"),
        ("default = ", "is no TOML"),
    ],
)
def test_wrong_recipes(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(LowbitError) as caught:
        Recipe.from_file(file)
    assert caught.value.code == "E0404"
    assert says in caught.value.message and "recipe.toml" in caught.value.message


def test_a_wrong_method_in_a_recipe_names_the_rule(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[[rule]]\nmodules = 'mlp'\nquantization = 'fp9'")
    with pytest.raises(LowbitError, match="recipe.toml: rule 1: unknown quantization method 'fp9'") as caught:
        Recipe.from_file(file)
    assert caught.value.code == "E0402"
    with pytest.raises(LowbitError) as missing:
        Recipe.from_file(tmp_path / "none.toml")
    assert missing.value.code == "E0301"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"quantization": "fp8", "torchao_config": "int8wo"}, "--quantization and --torchao-config"),
        ({"torchao_config": "int8wo", "recipe_file": "r.toml"}, "--torchao-config and --quantization-recipe"),
    ],
)
def test_two_flags_that_both_say_how(asked: dict[str, str], says: str) -> None:
    with pytest.raises(LowbitError, match=says) as caught:
        Asked(**asked)
    assert caught.value.code == "E0405"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"quantization": "fp8", "gguf_type": "q4_0"}, "belongs to --quantization gguf"),
        ({"gguf_type": "q4_0"}, "--gguf-type says nothing without"),
        ({"ignore": "head"}, "--quantization-ignore says nothing without"),
        ({"quantization": "gguf:type=q8_0", "gguf_type": "q4_0"}, "both name a type"),
    ],
)
def test_flags_that_need_another(asked: dict[str, str], says: str) -> None:
    with pytest.raises(LowbitError, match=says) as caught:
        Asked(**asked).recipe()
    assert caught.value.code == "E0405"


@pytest.mark.parametrize("name", ["int4wo", "int4wo-16", "int8", "INT8WO", "fp8dq"])
def test_torchao_names_are_checked_at_once(name: str) -> None:
    with pytest.raises(LowbitError, match="choices: int8dq, int8wo") as caught:
        Asked(torchao_config=name)
    assert caught.value.code == "E0402"


def test_the_gguf_type_becomes_an_option() -> None:
    recipe = Asked("gguf", gguf_type="q4_0").recipe()
    assert recipe is not None and recipe.methods[0].options["type"] == "q4_0"
    assert Asked().recipe() is None
