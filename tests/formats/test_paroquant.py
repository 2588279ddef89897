"""ParoQuant: GPTQModel's own weights and logits, the own tool's mixtures, damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, fixture_cases, header_of, read, reader_of, write_folder
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.loading import load_model, plan_model
from lowbit.numerics.rotation import Rotation

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("paroquant")]
CASE = FIXTURES / "paroquant/g32"
DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (64, 96)


def logits(folder: Path, tokens: list[list[int]], **options: Any) -> Tensor:
    model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32", **options)
    return prompt_logits(model, tokens)[0]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_weights_and_logits(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    wanted = expected.pop("logits")
    for name, values in expected.items():
        found = read(folder, name.removesuffix(".weight"), (values.shape[0], values.shape[1]))
        assert torch.equal(found.weight.dequantize(), values), name
        assert found.input is not None and found.input.rotation is not None and found.input.only_rotates
    tokens = json.loads((folder / "about.json").read_text())["tokens"]
    near = 0.02 * wanted.abs().max()  # x is bfloat16 before products
    assert (logits(folder, tokens) - wanted).abs().max() <= near
    exact = logits(folder, tokens, linear_kernel="reference", dtype="float32")
    assert (exact - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_the_plan_says_what_is_rotated() -> None:
    [down] = [module for module in plan_model(header_of(CASE), device="cpu").modules if module.name == DOWN]
    assert str(down.scheme) == "uint4 1x32 bf16 asym (input rotated by givens 32)"
    assert down.kernel == "cpu_blocks"
    assert reader_of(CASE).describe() == "paroquant, 4-bit, group 32, 8 rotations in config.json"


def test_every_pair_turns_by_its_angle() -> None:
    """By hand: two blocks of four columns, one of them scaled, in two steps."""
    pairs = torch.tensor([[[[0, 3], [2, 1]], [[0, 1], [3, 2]]], [[[1, 0], [2, 3]], [[3, 0], [1, 2]]]])
    angles = torch.tensor([[[0.3, -1.0], [2.0, 0.1]], [[0.7, 0.2], [-0.4, 3.0]]])
    scales = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.0, 1.0, 3.0, 1.0])
    rotation, x = Rotation.givens(4, pairs, angles, scales), torch.randn(3, 8)
    wanted = (x * scales).double()
    for step in range(2):
        for block in range(2):
            places = pairs[step, block] + 4 * block
            for (i, j), angle in zip(places, angles[step, block].double(), strict=True):
                a, b = wanted[:, i].clone(), wanted[:, j].clone()
                wanted[:, i] = a * angle.cos() + b * angle.sin()
                wanted[:, j] = b * angle.cos() - a * angle.sin()
    assert torch.allclose(rotation(x).double(), wanted, atol=1e-6)
    second = rotation.columns(4, 8)
    assert torch.equal(second(x[:, 4:]), rotation(x)[:, 4:]), "blocks do not meet"
    back = rotation.transposed(rotation(x))
    assert torch.allclose(back, x * scales**2, atol=1e-5)
    assert rotation.is_whole and rotation.same_as(Rotation.givens(4, pairs, angles, scales))
    assert not rotation.same_as(Rotation.givens(4, pairs, angles + 0.1, scales))
    assert rotation.partners is not None
    assert not replace(rotation, partners=rotation.partners.flip(1)).is_whole, "pairs of two blocks"


def test_experts_share_a_rotation(tmp_path: Path) -> None:
    """The own tool's names: gate and up of all experts have one, their down projections another."""
    seed = Seed.of(CASE)
    parts = {key.removeprefix(f"{DOWN}."): t for key, t in seed.tensors.items() if key.startswith(DOWN)}
    base, tensors = "model.layers.0.mlp.experts", {}
    turned = {part: parts.pop(part) for part in ("theta", "pairs", "channel_scales")}
    for expert in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors |= {f"{base}.{expert}.{name}.{part}": t.clone() for part, t in parts.items()}
    for kind in ("gate_up_weight", "down_weight"):
        tensors |= {f"{base}.{kind}_{part}": t.clone() for part, t in turned.items()}
    tensors[f"{base}.down_weight_theta"] *= 2
    folder = write_folder(tmp_path / "m", tensors, seed.config["quantization_config"])
    own = read(CASE, DOWN, SHAPE).input
    gate, down = (read(folder, f"{base}.1.{name}", SHAPE).input for name in ("gate_proj", "down_proj"))
    assert own and gate and down and own.rotation and gate.rotation and down.rotation
    assert gate.rotation.same_as(own.rotation) and not down.rotation.same_as(own.rotation)
    reader = reader_of(folder)
    module = StoredModule(f"{base}.0.up_proj", f"{base}.0.up_proj", SHAPE)
    assert f"{base}.gate_up_weight_pairs" in reader.tensors_of(module)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("pairs", "E0213", "does not pair all 32 columns of group 1 in rotation 2; the file is damaged"),
        ("theta", "E0213", "ParoQuant with 8 rotations (krot) stores [8, 48]"),
        ("nan", "E0215", "contains 1 NaN of 96"),
        ("missing", "E0209", "channel_scales' (ParoQuant with 8 rotations (krot))"),
        ("bits", "E0212", "bits is 3"),
        ("krot", "E0212", "has no 'krot'"),
    ],
)
def test_damaged(change: str, code: str, said: str, tmp_path: Path) -> None:
    seed = Seed.of(CASE)
    config, tensors = json.loads(json.dumps(seed.config)), dict(seed.tensors)
    if change == "pairs":
        tensors[f"{DOWN}.pairs"] = tensors[f"{DOWN}.pairs"].clone()
        tensors[f"{DOWN}.pairs"][2, 33] = tensors[f"{DOWN}.pairs"][2, 32]
    elif change == "theta":
        tensors[f"{DOWN}.theta"] = tensors[f"{DOWN}.theta"][:7].contiguous()
    elif change == "nan":
        tensors[f"{DOWN}.channel_scales"] = tensors[f"{DOWN}.channel_scales"].clone()
        tensors[f"{DOWN}.channel_scales"][0, 4] = torch.nan
    elif change == "missing":
        del tensors[f"{DOWN}.channel_scales"]
    elif change == "bits":
        config["quantization_config"]["bits"] = 3
    else:
        del config["quantization_config"]["krot"]
    folder = seed.write(tmp_path, config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, DOWN, SHAPE)
    assert caught.value.code == code and said in str(caught.value)
