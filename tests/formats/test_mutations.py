"""Over 1,000 seeded cases of wrong metadata, each refused or without effect.

What cannot be seen in a file is listed in ``UNSEEN`` with its reason; only a hash manifest or the language
canary of ``lowbit check`` can find it.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers

from formats.helpers import FIXTURES
from formats.mutations import TENSOR_CHANGES, Seed, leaves, verdict, with_leaf, wrong_values
from formats.test_gptq import config as gptq_config
from formats.test_gptq import make as gptq_module

SEEDS = sorted(path.parent for path in FIXTURES.glob("*/*/model.safetensors"))
QUANTIZATION = ("quantization_config", "compression_config", "quip_params")
CASES = {"few": (3, 3, 1), "many": (6, 5, 3)}  # values of quantization configs, tensors, and other values

# (what was changed in which fixture, why nobody can see it)
UNSEEN = (
    (r"modelopt/.*input_scale dropped", "inputs without a scale are scaled token by token"),
    (r"\.(weight|compressed) NaN", "a number of a plain matrix; lowbit check reads them all"),
    (r"input_activations.*num_bits'?\) =", "nothing stored depends on the width inputs are rounded to"),
    (
        r"input_activations.*'(strategy|dynamic|type)",
        "nothing stored depends on how inputs are scaled at run time",
    ),
    (r"transform_config.*'(inverse|ignore)'", "a matrix and its transpose, and layers they fit, look alike"),
    (r"forward_method|forward_hadamard_matrix", "nothing stored depends on how inputs are scaled and turned"),
    (r"hadamard_size", "nothing stored depends on how many inputs are turned together"),
    (r"tune_metadata.*template_id", "every order has the same codes, in other rows"),
    (r"resid_scale_override", "nothing stored depends on what the second code is divided by"),
    (r"activation_scheme|act_dynamic|activation_scale_ub|scale_fmt", "a rule for inputs only"),
    (r"llm_int8_threshold", "a rule for inputs only"),
    (
        r"rms_norm_eps|rope_theta|rope_parameters|hidden_act|attention_bias|tie_word",
        "changes no stored weight",
    ),
)


def run(seed: Seed, label: str, folder: Path, config: dict, tensors: dict) -> str:
    found = verdict(seed, folder, config, tensors)
    if found.startswith("silent"):
        told = f"{seed.name}: {label}"
        assert any(re.search(pattern, told) for pattern, _ in UNSEEN), f"{told}: {found}"
    return found


@pytest.mark.parametrize("cases", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_wrong_metadata(folder: Path, cases: str, tmp_path: Path) -> None:
    seed = Seed.of(folder)
    config_cases, tensor_cases, model_cases = CASES[cases]
    generator = random.Random(seed.name)
    paths = list(leaves(seed.config))
    quantization = [path for path in paths if path[0] in QUANTIZATION]
    others = [path for path in paths if path[0] not in QUANTIZATION]
    verdicts = []
    for count, choice in ((config_cases, quantization or others), (model_cases, others)):
        for _ in range(count):
            label, config = wrong_values(seed.config, generator.choice(choice), generator)
            verdicts.append(run(seed, label, tmp_path, config, seed.tensors))
    names = [name for name in seed.tensors if re.search(r"\.(layers|h)\.0\.", name)]
    for _ in range(tensor_cases):
        name, change = generator.choice(names), generator.choice(list(TENSOR_CHANGES))
        changed = TENSOR_CHANGES[change](seed.tensors[name])
        if changed is not None:
            label = f"{name} {change}"
            verdicts.append(run(seed, label, tmp_path, seed.config, {**seed.tensors, name: changed}))
    without = generator.choice(names)
    verdicts.append(run(seed, f"{without} dropped", tmp_path, seed.config, drop(seed, without)))
    assert any(found.startswith("refused") for found in verdicts)


def drop(seed: Seed, name: str) -> dict:
    return {key: tensor for key, tensor in seed.tensors.items() if key != name}


def test_there_are_enough_cases() -> None:
    assert len(SEEDS) * sum(CASES["few"]) >= 1000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return Seed.of(folder)


IMPOSSIBLE = {
    "hidden_size": (0, -1, 10**12, 65, "64", 64.5),
    "num_attention_heads": (0, -4, 3, 7, True),
    "num_key_value_heads": (0, 3, -2),
    "num_hidden_layers": (0, -1, 2, 10**9),
    "vocab_size": (0, 31, 33, 10**12),
    "intermediate_size": (0, 95, 10**12),
    "rms_norm_eps": (-1, 0, 2, "x"),
    "max_position_embeddings": (0, -1, 10**13),
    "head_dim": (0, 15, 17),
    "architectures": ([], ["Nonsense"], "Llama", None, [7]),
    "hidden_act": ("nonsense", 3),
    "rope_parameters": ({"rope_type": "nonsense"}, {"rope_type": "yarn"}, [1], {"rope_theta": -5}),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values]
)
def test_impossible_model_configs(key: str, value: object, plain: Seed, tmp_path: Path) -> None:
    found = verdict(plain, tmp_path, with_leaf(plain.config, (key,), value), plain.tensors)
    assert found.startswith("refused"), found


def test_remote_code_is_never_run(plain: Seed, tmp_path: Path) -> None:
    asked = {**plain.config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    assert verdict(plain, tmp_path / "a", asked, plain.tensors) == "equal"
    asked["architectures"] = ["EvilForCausalLM"]
    assert verdict(plain, tmp_path / "b", asked, plain.tensors) == "refused E0240"


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1e999}', "[" * 10**5, '{"a": 1, "a": 2}', '{"a": "\x00']
)
def test_broken_config_files(text: str, plain: Seed, tmp_path: Path) -> None:
    from lowbit.checkpoint import open_checkpoint
    from lowbit.errors import LowbitError

    folder = plain.write(tmp_path, plain.config, plain.tensors)
    (folder / "config.json").write_text(text)
    with pytest.raises(LowbitError):
        open_checkpoint(str(folder))


def test_a_config_of_a_gigabyte_is_not_read(plain: Seed, tmp_path: Path) -> None:
    from lowbit.checkpoint import open_checkpoint
    from lowbit.errors import LowbitError

    folder = plain.write(tmp_path, plain.config, plain.tensors)
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(LowbitError, match="config.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("seed", range(12))
def test_gptq_metadata(seed: int, tmp_path: Path) -> None:
    """GPTQ modules whose config has every number at random: refused, or the same weights."""
    from formats.helpers import read, write_folder
    from lowbit.errors import LowbitError

    generator = random.Random(seed)
    tensors, wanted = gptq_module(4, 32, sym=bool(seed % 2), act_order=bool(seed % 3))
    for number in range(10):
        written = gptq_config(4, 32, sym=bool(seed % 2), desc_act=bool(seed % 3))
        key = generator.choice(["bits", "group_size", "checkpoint_format", "pack_dtype", "quant_method"])
        written[key] = generator.choice(
            [0, -2, 1, 2, 3, 5, 8, 31, 33, 64, 128, 2**31, "x", None, 4.0, [], "int8"]
        )
        folder = write_folder(tmp_path / str(number), tensors, written)
        try:
            found = read(folder, "model.layers.0.self_attn.q_proj", (64, 96)).weight.dequantize()
        except LowbitError:
            continue
        assert torch.equal(found, torch.from_numpy(wanted)), json.dumps(written)
