"""Checkpoints whose layers rotate their inputs and outputs: the tool's own logits, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model, plan_model
from lowbit.loading.source_modules import SourceModel

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("transforms")]
DOWN = "model.layers.0.mlp.down_proj"
# int8 codes of inputs tip on the last bit of a float32 sum, and everything after them with it.
ROUNDED = {"spinquant_w8a8": 0.1}


def case(name: str) -> Path:
    return FIXTURES / "transforms" / name


def tokens_of(folder: Path) -> list[list[int]]:
    found: list[list[int]] = json.loads((folder / "about.json").read_text())["tokens"]
    return found


def logits(folder: Path, **options: Any) -> Tensor:
    model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32", **options)
    return prompt_logits(model, tokens_of(folder))[0]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_weights(folder: Path) -> None:
    for name, values in load_file(folder / "expected.safetensors").items():
        if name != "logits":
            found = read(folder, name.removesuffix(".weight"), (values.shape[0], values.shape[1]))
            assert torch.equal(found.weight.dequantize(), values), name
            assert found.weight.scheme == reader_of(folder).scheme_of(
                StoredModule(name.removesuffix(".weight"), name.removesuffix(".weight"), tuple(values.shape))
            )


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_logits(folder: Path) -> None:
    """In float32 to the sixth digit; native kernels as near as their inputs' roundings let them."""
    wanted = load_file(folder / "expected.safetensors")["logits"]
    exact = logits(folder, linear_kernel="reference", dtype="float32")
    assert (exact - wanted).abs().max() <= ROUNDED.get(folder.name, 1e-5)
    found = logits(folder)
    assert (found - wanted).abs().max() <= 0.05
    kl = wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))
    assert kl.sum(-1).max() < 3e-4


@pytest.mark.parametrize("folder", CASES)
def test_rotations_left_out_would_show(folder: Path, tmp_path: Path) -> None:
    """Without a step's rotation logits are another model's: the oracle sees every one, but those of Q and K,
    which cancel out."""
    seed, wanted = Seed.of(folder), load_file(folder / "expected.safetensors")["logits"]
    groups = seed.config["quantization_config"]["transform_config"]["config_groups"]
    for name, group in groups.items():
        for number, step in enumerate(group["apply"]):
            if step["location"] not in ("input", "output"):
                continue
            config = copy.deepcopy(seed.config)
            left = config["quantization_config"]["transform_config"]["config_groups"][name]["apply"]
            del left[number]
            ends = f".{name}_{step['location']}"
            tensors = {key: value for key, value in seed.tensors.items() if ends not in key}
            changed = seed.write(tmp_path / f"{name}{number}", config, tensors)
            (changed / "about.json").write_text((folder / "about.json").read_text())
            assert (logits(changed, linear_kernel="reference", dtype="float32") - wanted).abs().max() > 0.1


def test_heads_are_rotated_after_their_rotary_embedding(tmp_path: Path) -> None:
    """Of Q and K alike it cancels out; of Q alone it does not."""
    seed = Seed.of(case("spinquant_w8a8"))
    model = load_model(header_of(case("spinquant_w8a8")), device="cpu")
    assert all(block.q_rotator is not None and block.k_rotator is not None for block in model.blocks)
    config = copy.deepcopy(seed.config)
    group = config["quantization_config"]["transform_config"]["config_groups"]["R3"]
    group["apply"] = [step for step in group["apply"] if step["location"] == "q_attn"]
    folder = seed.write(tmp_path, config, seed.tensors)
    (folder / "about.json").write_text((case("spinquant_w8a8") / "about.json").read_text())
    wanted = load_file(case("spinquant_w8a8") / "expected.safetensors")["logits"]
    assert (logits(folder) - wanted).abs().max() > 0.1


def test_what_inspect_says() -> None:
    plan = plan_model(header_of(case("quip_w4a16")), device="cpu")
    [down] = [module for module in plan.modules if module.name == DOWN]
    assert str(down.scheme) == (
        "int4 1x16 f32 (input rotated by random-hadamard 48, output rotated by random-hadamard 64)"
    )
    assert "rotated at run time: output, input in" in reader_of(case("quip_w4a16")).describe()
    assert "rotated at run time: q_attn, k_cache, input in" in reader_of(case("spinquant_w8a8")).describe()
    assert reader_of(case("spinquant_w8a8")).scheme_of(StoredModule(DOWN, DOWN, (64, 64))).rotated == (
        "input rotated by hadamard 64"
    )


def test_layers_share_their_matrices() -> None:
    """The file holds one beside the first module of the group; all others find it, and Q, K and V fuse."""
    folder = case("randomized_w8a16")
    stored = [name for name in header_of(folder).tensors if "_input." in name or "_output." in name]
    assert len(stored) == 3
    model = load_model(header_of(folder), device="cpu")
    linears = [linear for block in model.blocks for linear in (block.qkv, block.output, block.mlp.down)]
    assert all(len(linear.weights) == 1 and linear.inputs and linear.outputs for linear in linears)
    assert len({id(linear.inputs[0].rotation) for linear in linears}) == 1
    assert len({id(linear.outputs[0]) for linear in linears}) == 1


@pytest.mark.parametrize("name", ["quip_w4a16", "spinquant_w8a8"])
def test_converting_is_refused(name: str) -> None:
    with pytest.raises(LowbitError) as caught:
        SourceModel(header_of(case(name)))
    assert caught.value.code == "E0450" and "rotated" in str(caught.value)


def test_ranks_keep_blocks_whole() -> None:
    """Blocks of 32 are cut between; a block as wide as the layer cannot be."""
    plan = plan_model(header_of(case("quip_block_mxfp4")), device="cpu", tp_size=2)
    [down] = [module for module in plan.modules if module.name == DOWN]
    assert down.shape == (64, 32) and "32" in down.cut
    for name in ("spinquant_w8a8", "quip_w4a16"):
        with pytest.raises(LowbitError) as caught:
            plan_model(header_of(case(name)), device="cpu", tp_size=2)
        assert caught.value.code == "E0431", name


def groups_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["transform_config"]["config_groups"]
    return found


def changed(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda groups: groups["v"].update({key: value})


def applied(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda groups: groups["v"]["apply"][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (changed("head_dim", 7), "E0212", "does not divide the 64 inputs"),
        (changed("head_dim", 0), "E0212", "head_dim"),
        (changed("head_dim", True), "E0212", "head_dim"),
        (changed("head_dim", 16), "E0213", "[32, 32]"),
        (changed("type", "fourier"), "E0218", "type"),
        (changed("new_key", 1), "E0212", "new_key"),
        (changed("apply", {}), "E0212", "apply"),
        (changed("randomize", 3), "E0212", "randomize"),
        (changed("randomize", True), "E0209", "v_input.perm"),
        (applied("location", "middle"), "E0212", "location"),
        (applied("inverse", "no"), "E0212", "inverse"),
        (applied("targets", 3), "E0212", "targets"),
        (applied("targets", None), "E0212", "targets"),
        (applied("targets", ["re:("]), "E0212", "pattern"),
        (applied("targets", ["Linear", "re:.*mlp$"]), "E0218", "re:.*mlp$"),
        (applied("targets", ["Linear", "re:.*embed_tokens$"]), "E0218", "embedding"),
        (applied("location", "q_attn"), "E0218", "no attention"),
        (lambda groups: groups.update(w=copy.deepcopy(groups["v"])), "E0218", "second time"),
        (lambda groups: groups.update(w=[]), "E0212", "must be an object"),
    ],
)
def test_configs_that_are_refused(
    change: Callable[[dict[str, Any]], None], code: str, word: str, tmp_path: Path
) -> None:
    seed = Seed.of(case("quip_block_mxfp4"))
    config = copy.deepcopy(seed.config)
    change(groups_of(config))
    folder = seed.write(tmp_path, config, seed.tensors)
    with pytest.raises(LowbitError) as caught:
        load_model(header_of(folder), device="cpu")
    assert caught.value.code == code and word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "code"),
    [
        ("quip_w4a16", "v_input.weight", torch.zeros(32, 64), "E0213"),
        ("quip_w4a16", "v_input.weight", torch.zeros(64, 64, dtype=torch.int8), "E0213"),
        ("quip_w4a16", "v_input.weight", torch.full((64, 64), float("nan")), "E0215"),
        ("quip_w4a16", "v_input.weight", None, "E0209"),
        ("randomized_w8a16", "V_input.perm", torch.zeros(32, dtype=torch.int64), "E0213"),
        ("randomized_w8a16", "V_input.perm", torch.arange(31), "E0213"),
        ("randomized_w8a16", "V_input.perm", None, "E0209"),
    ],
)
def test_matrices_that_are_refused(
    name: str, key: str, value: Tensor | None, code: str, tmp_path: Path
) -> None:
    seed = Seed.of(case(name))
    full = f"model.layers.0.self_attn.q_proj.{key}"
    assert full in seed.tensors
    tensors = {key: value for key, value in (seed.tensors | {full: value}).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        load_model(header_of(folder), device="cpu")
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_a_matrix_that_cannot_be_told(tmp_path: Path) -> None:
    """Two modules have one of their own, a third has none."""
    seed = Seed.of(case("quip_w4a16"))
    first = "model.layers.0.self_attn.q_proj.v_input.weight"
    more = {first.replace("q_proj", "k_proj"): seed.tensors[first] * -1}
    folder = seed.write(tmp_path, seed.config, seed.tensors | more)
    with pytest.raises(LowbitError) as caught:
        load_model(header_of(folder), device="cpu")
    assert caught.value.code == "E0218" and "shares" in str(caught.value)


def test_sylvesters_needs_no_tensor(tmp_path: Path) -> None:
    seed = Seed.of(case("quip_block_mxfp4"))
    tensors = {key: value for key, value in seed.tensors.items() if "v_input" not in key}
    assert len(tensors) < len(seed.tensors)
    folder = seed.write(tmp_path, seed.config, tensors)
    (folder / "about.json").write_text((case("quip_block_mxfp4") / "about.json").read_text())
    assert torch.equal(logits(folder), logits(case("quip_block_mxfp4")))


def test_a_tied_head_is_not_rotated_by_half(tmp_path: Path) -> None:
    seed = Seed.of(case("quip_block_mxfp4"))
    config = copy.deepcopy(seed.config) | {"tie_word_embeddings": True}
    for step in groups_of(config)["v"]["apply"]:
        step["ignore"] = []
    tensors = {key: value for key, value in seed.tensors.items() if key != "lm_head.weight"}
    folder = seed.write(tmp_path, config, tensors)
    with pytest.raises(LowbitError) as caught:
        load_model(header_of(folder), device="cpu")
    assert caught.value.code == "E0218" and "lm_head" in str(caught.value)
