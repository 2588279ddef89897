"""Config and names: one test a rule, and the corrections that are certain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from doctor.helpers import (
    QPROJ,
    Tensors,
    add_tokenizer,
    checked,
    dense,
    edit,
    fixed,
    gptq,
    only,
    rename,
    rules,
    set_config,
    sharded,
)
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import plan_model


def drop(*names: str) -> object:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    names = (f"{QPROJ}.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight")
    edit(dense(tmp_path), drop(*names))  # type: ignore[arg-type]
    findings = checked(tmp_path).report.findings
    assert [finding.rule for finding in findings] == ["D101"] * 3
    assert all(any(repr(name) in finding.message for finding in findings) for name in names)


def test_extra_tensors(tmp_path: Path) -> None:
    edit(dense(tmp_path), lambda tensors: tensors.update({"model.layers.7.x": torch.ones(3)}))
    assert "'model.layers.7.x' has no place in llama (1 such of 13)" in only(tmp_path, "D102")


def test_a_renamed_tensor_is_missing_and_extra(tmp_path: Path) -> None:
    edit(dense(tmp_path), rename(f"{QPROJ}.weight", f"{QPROJ}.wait"))
    assert rules(tmp_path) == ["D101", "D102"]


@pytest.mark.parametrize("name", [f"{QPROJ}.weight", "model.norm.weight"])
def test_wrong_shapes(name: str, tmp_path: Path) -> None:
    edit(dense(tmp_path), lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    assert repr(name) in only(tmp_path, "D103")


def test_unknown_method(tmp_path: Path) -> None:
    dense(tmp_path, quantization_config={"quant_method": "exl9"})
    edit(tmp_path, lambda tensors: tensors.update({f"{QPROJ}.qweight": torch.ones(2, 2, dtype=torch.int32)}))
    assert "'exl9'" in only(tmp_path, "D104")


@pytest.mark.parametrize("change", [{"group_size": 0}, {"bits": 9}, {"bits": "4"}])
def test_impossible_quantization_config(change: dict[str, object], tmp_path: Path) -> None:
    only(gptq(tmp_path, change), "D105")


def test_quantization_config_of_a_wrong_type(tmp_path: Path) -> None:
    dense(tmp_path, quantization_config=["gptq"])
    only(tmp_path, "D105")


def test_packing_contradicts_the_config(tmp_path: Path) -> None:
    found = rules(gptq(tmp_path, {"bits": 8}))
    assert found == ["D106"] * 7, "each of the seven linears"


@pytest.mark.parametrize("change", [{"num_hidden_layers": 0}, {"rms_norm_eps": "x"}, {"architectures": []}])
def test_bad_config(change: dict[str, object], tmp_path: Path) -> None:
    only(dense(tmp_path, **change), "D107")


def test_unknown_architecture_is_a_warning_and_the_numbers_are_read(tmp_path: Path) -> None:
    dense(tmp_path, architectures=["MambaForCausalLM"])
    edit(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    assert rules(tmp_path) == ["D108", "D201"]


def test_contradictions_the_readers_settle(tmp_path: Path) -> None:
    dense(tmp_path, quantization_config={"quant_method": "mxfp4"})
    edit(tmp_path, lambda tensors: tensors.update({f"{QPROJ}.weight_scale": torch.ones(1)}))
    assert "D109" in rules(tmp_path)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_dequantized_with_the_config_kept(place: str, tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    if place == "config.json":
        dense(tmp_path / "in", quantization_config=quantization)
    else:
        dense(tmp_path / "in")
        (tmp_path / "in" / place).write_text(json.dumps(quantization))
    assert f"{place}" in only(tmp_path / "in", "D110")
    copy = fixed(tmp_path / "in", tmp_path / "out")
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    assert not (copy / "quantize_config.json").exists()
    assert plan_model(open_checkpoint(str(copy))).format == "dense"


def test_nested_quantization_config_is_removed_too(tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    dense(tmp_path / "in", text_config={"quantization_config": quantization, "x": 1})
    copy = fixed(tmp_path / "in", tmp_path / "out")
    assert json.loads((copy / "config.json").read_text())["text_config"] == {"x": 1}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"]}},
            "format": "dense",
        },
    ],
)
def test_a_config_that_asks_for_nothing_is_no_stray(quantization: dict[str, object], tmp_path: Path) -> None:
    assert "D110" not in rules(dense(tmp_path, quantization_config=quantization))


def test_quantized_tensors_without_a_config(tmp_path: Path) -> None:
    set_config(gptq(tmp_path), quantization_config=None)
    assert "part of a GPTQ or AWQ weight" in only(tmp_path, "D111")


@pytest.mark.parametrize(
    ("prefix", "rule"),
    [
        ("model.language_model.", "D112"),
        ("language_model.model.", "D112"),
        ("", "D112"),
        ("base_model.model.model.", "D113"),
        ("_orig_mod.model.", "D113"),
        ("transformer.", "D113"),
    ],
)
def test_prefixes(prefix: str, rule: str, tmp_path: Path) -> None:
    edit(dense(tmp_path / "in"), rename("model.", prefix))
    if prefix.endswith("mod.model."):
        edit(tmp_path / "in", rename("lm_head.", f"{prefix.removesuffix('model.')}lm_head."))
    assert repr(prefix) in only(tmp_path / "in", rule)
    copy = fixed(tmp_path / "in", tmp_path / "out")
    assert plan_model(open_checkpoint(str(copy))).format == "dense"


def test_a_prefix_in_shards_is_renamed_in_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    for file in folder.glob("*.safetensors"):
        edit(folder, rename("model.", "module.model."), file.name)
        edit(folder, rename("lm_head.", "module.lm_head."), file.name)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {f"module.{name}": shard for name, shard in names.items()}}))
    copy = fixed(folder, tmp_path / "out")
    written = json.loads((copy / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == dict(sorted(names.items()))
    assert written["metadata"]["total_size"] == open_checkpoint(str(copy)).nbytes


def test_a_prefix_the_quantization_config_names_is_not_renamed(tmp_path: Path) -> None:
    rule = {"dynamic": {"-:language_model.model.layers.0.x": {}}}
    edit(gptq(tmp_path, rule), rename("model.", "language_model.model."))
    found = checked(tmp_path)
    assert [finding.rule for finding in found.report.findings] == ["D112"] and not found.can_fix


def test_a_prefix_with_other_tensors_beside_it_is_not_renamed(tmp_path: Path) -> None:
    edit(dense(tmp_path), rename("model.", "language_model.model."))
    edit(tmp_path, lambda tensors: tensors.update({"vision_tower.x": torch.ones(2)}))
    assert rules(tmp_path) == ["D102", "D112"] and not checked(tmp_path).can_fix


def test_no_head_and_no_word_of_it(tmp_path: Path) -> None:
    edit(dense(tmp_path / "in", tie_word_embeddings=None), drop("lm_head.weight"))  # type: ignore[arg-type]
    assert "does not have the key tie_word_embeddings" in only(tmp_path / "in", "D114")
    copy = fixed(tmp_path / "in", tmp_path / "out")
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is True


def test_no_head_though_the_config_wants_one(tmp_path: Path) -> None:
    edit(dense(tmp_path), drop("lm_head.weight"))  # type: ignore[arg-type]
    assert "says tie_word_embeddings false" in only(tmp_path, "D114")
    assert not checked(tmp_path).can_fix, "a shard may be missing"


def test_tied_with_a_head_of_its_own(tmp_path: Path) -> None:
    assert "'lm_head.weight'" in only(dense(tmp_path, tie_word_embeddings=True), "D115")


def test_tied_with_a_copy(tmp_path: Path) -> None:
    dense(tmp_path / "in", tie_word_embeddings=True)
    edit(
        tmp_path / "in",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    only(tmp_path / "in", "D116")
    assert "lm_head.weight" not in open_checkpoint(str(fixed(tmp_path / "in", tmp_path / "out"))).tensors


def test_tied_and_no_head_is_sound(tmp_path: Path) -> None:
    edit(dense(tmp_path, tie_word_embeddings=True), drop("lm_head.weight"))  # type: ignore[arg-type]
    assert rules(tmp_path) == []


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    add_tokenizer(dense(tmp_path), 41)
    assert "41 ids" in only(tmp_path, "D117")


def test_vocab_size(tmp_path: Path) -> None:
    dense(tmp_path, vocab_size=41)
    assert rules(tmp_path) == ["D118", "D118"], "the embedding and the head"


def test_no_dtype(tmp_path: Path) -> None:
    only(dense(tmp_path, dtype=None), "D119")
    set_config(tmp_path, torch_dtype="float32")
    assert rules(tmp_path) == []


def test_no_tokenizer_and_a_bad_one(tmp_path: Path) -> None:
    (dense(tmp_path) / "tokenizer.json").unlink()
    only(tmp_path, "D120")
    (tmp_path / "tokenizer.json").write_text("{}")
    only(tmp_path, "D121")
