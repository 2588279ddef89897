"""Qwen3-Next and Qwen3.5 against transformers in float32, on random tiny checkpoints it saved: whole prompts,
steps, chunks, several sequences in a batch; and the configs that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forward_helpers import allocate, chunk_batch, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels import native, recurrent
from lowbit.kernels.recurrent_reference import ReferenceDelta
from lowbit.loading import load_model, plan_model
from lowbit.models.model import Model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 80,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "mlp_only_layers": [1],
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CASES: dict[str, dict] = {
    "as published": {},
    "biases, few taps, other layers": {
        "attention_bias": True,
        "linear_conv_kernel_dim": 2,
        "layer_types": ["full_attention", *["linear_attention"] * 3, "full_attention"],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "odd value heads, dense": {"linear_value_head_dim": 20, "linear_num_value_heads": 2, "num_experts": 0},
    "Qwen3_5": {},
    "Qwen3_5 with biases, other layers, tied": {
        "attention_bias": True,
        "layer_types": ["full_attention", *["linear_attention"] * 3, "full_attention"],
        "tie_word_embeddings": True,
    },
    "Qwen3_5Moe": {"linear_conv_kernel_dim": 3},
}
# What the classes of Qwen3.5 have no key for.
NOT_35 = ("mlp_only_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
NOT_35 += ("shared_expert_intermediate_size",)
TOLERANCE = 1e-4  # of the largest logit of a row, as of the other families


def make_checkpoint(folder: Path, kind: str = "Qwen3Next", **changes: object) -> transformers.PreTrainedModel:
    """Random weights, saved by transformers."""
    torch.manual_seed(5)
    without = {"Qwen3Next": (), "Qwen3_5": NOT_35, "Qwen3_5Moe": ("mlp_only_layers", "intermediate_size")}[
        kind
    ]
    values = {key: value for key, value in (SIZES | changes).items() if key not in without}
    config = getattr(transformers, f"{kind}{'Config' if kind == 'Qwen3Next' else 'TextConfig'}")(**values)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attn.norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "norm" in name:
                parameter.uniform_(-0.5, 0.5)
            elif "A_log" in name:
                parameter.uniform_(-3.0, 1.0)
            elif "conv1d" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


def kind_of(case: str) -> str:
    """The class of a case."""
    return case.split()[0] if case.startswith("Qwen") else "Qwen3Next"


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 131, (n,), generator=generator).tolist() for n in lengths]


def worst(logits: Tensor, expected: Tensor) -> float:
    return float(((logits - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def loaded(folder: Path) -> Model:
    return load_model(open_checkpoint(str(folder)), device="cpu")


@pytest.fixture(params=["native", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recurrence on each of its kernels."""
    if request.param == "torch":
        monkeypatch.setattr(recurrent, "recurrent_kernels", lambda: [ReferenceDelta()])
    elif native.library() is None:
        pytest.skip("no native library")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kernel: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path, kind_of(case), **CASES[case])
    given = prompts(1, 3, 45, 150)
    for prompt, logits in zip(given, prompt_logits(loaded(tmp_path), given), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits[0]
        assert worst(logits, expected) <= TOLERANCE, f"{case}: {worst(logits, expected):.2e}"


def test_decoding_equals_transformers(kernel: str, tmp_path: Path) -> None:
    """Sequences of 7, 70 and 2 tokens go on together, one token a step, as in transformers."""
    oracle, model = make_checkpoint(tmp_path), loaded(tmp_path)
    given, steps = prompts(7, 70, 2), 12
    caches, slots = allocate(model, 30), [5, 0, 11]
    pages = [list(range(row, 30, 3)) for row in range(3)]
    batch = chunk_batch([(p, 0, own) for p, own in zip(given, pages, strict=True)], False, slots)
    logits = model.forward(batch, caches)
    memories, expected = [], []
    for prompt in given:
        with torch.no_grad():
            out = oracle(torch.tensor([prompt]), use_cache=True)
        memories.append(out.past_key_values)
        expected.append(out.logits[0, -1])
    lengths = [len(prompt) for prompt in given]
    for _ in range(steps):
        assert worst(logits, torch.stack(expected)) <= TOLERANCE
        tokens = [int(row.argmax()) for row in expected]
        rows = [([t], n, own) for t, n, own in zip(tokens, lengths, pages, strict=True)]
        logits = model.forward(chunk_batch(rows, False, slots), caches).clone()
        for row, token in enumerate(tokens):
            with torch.no_grad():
                out = oracle(torch.tensor([[token]]), use_cache=True, past_key_values=memories[row])
            expected[row] = out.logits[0, -1]
            lengths[row] += 1


@pytest.mark.parametrize("chunk", [1, 2, 13, 64])
def test_chunks_and_company_change_no_bit(chunk: int, kernel: str, tmp_path: Path) -> None:
    """A prompt in chunks, beside another that goes its own way and in a used slot, gives its own bits alone.

    torch's functions may round otherwise at the end of a vector, so the reference's bits may differ.
    """
    make_checkpoint(tmp_path)
    model, [prompt, other] = loaded(tmp_path), prompts(90, 33)
    [alone] = prompt_logits(model, [prompt])
    caches, pages = allocate(model, 12), list(range(11, 4, -1))
    for cache in caches:
        if isinstance(cache, recurrent.LayerState):  # of whoever had the slots before
            cache.inputs.fill_(7.0)
            cache.matrices.fill_(float("nan"))
    found, at = [], 0
    for step, start in enumerate(range(0, len(prompt), chunk)):
        part = prompt[start : start + chunk]
        rows, slots = [(part, start, pages)], [3]
        size = 5 if step % 2 else 2
        if at + size <= len(other):
            rows, slots = [(other[at : at + size], at, [0, 1, 2]), *rows], [9, *slots]
            at += size
        logits = model.forward(chunk_batch(rows, state_slots=slots), caches)
        found.append(logits[len(logits) - len(part) :].clone())
    if kernel == "native":
        assert torch.equal(torch.cat(found), alone)
    assert worst(torch.cat(found), alone) <= 1e-5


def test_kernels_agree(tmp_path: Path) -> None:
    """The native kernel and the definition: outputs and the states that follow."""
    if native.library() is None:
        pytest.skip("no native library")
    generator = torch.Generator().manual_seed(3)
    spec = recurrent.StateSpec(k_heads=2, heads=6, k_dim=33, v_dim=80, taps=4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = recurrent.DeltaParameters(
        normal(4, spec.channels), -normal(6).exp(), normal(6), normal(80), 1e-6
    )
    mixed = normal(45, spec.width + 3)[:, : spec.width]
    rows = [([0] * 40, 0, [0] * 3), ([0], 17, [0] * 2), ([0] * 4, 1, [0])]
    batch = chunk_batch(rows, state_slots=[2, 0, 1])
    made = []
    for chosen in (recurrent.choose_recurrent(spec, mixed.device), ReferenceDelta()):
        generator.manual_seed(4)
        state = recurrent.LayerState(spec, chosen, normal(4, 3, spec.channels), normal(4, 6, 33, 80))
        made.append((chosen.run(mixed, state, batch, weights), state.inputs, state.matrices))
    assert made[0][0].shape == (45, 480)
    for one, other in zip(*made, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [1, 150])
def test_the_reference_as_on_a_device(longest: int) -> None:
    """Steps of one token together, prompts in chunks: what one by one gives."""
    generator = torch.Generator().manual_seed(3)
    spec = recurrent.StateSpec(k_heads=2, heads=4, k_dim=16, v_dim=8, taps=3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = recurrent.DeltaParameters(
        normal(3, spec.channels), -normal(4).exp(), normal(4), normal(8), 1e-6
    )
    rows = [([0] * longest, 0, [0] * 10), ([0], 5, [0]), ([0], 0, [0]), ([0] * min(longest, 70), 3, [0] * 5)]
    batch = chunk_batch(rows, state_slots=[3, 0, 1, -1])
    mixed, made = normal(len(batch.tokens), spec.width), []
    for together in (False, True):
        generator.manual_seed(4)
        state = recurrent.LayerState(spec, ReferenceDelta(), normal(5, 2, spec.channels), normal(5, 4, 16, 8))
        before = state.matrices[2].clone()
        out = ReferenceDelta().by_rule(mixed, state, batch, weights, together)
        assert torch.equal(state.matrices[2], before), "nobody's but the four"
        made.append((out, state.inputs, state.matrices))
    for one, other in zip(*made, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_prediction_layers_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    [before] = prompt_logits(loaded(tmp_path), prompts(9))
    tensors["mtp.fc.weight"] = torch.ones(64, 128)
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, path, {"format": "pt"})
    [after] = prompt_logits(loaded(tmp_path), prompts(9))
    assert torch.equal(before, after)


WRONG: list[tuple[dict, str]] = [
    ({"linear_num_key_heads": None}, "key 'linear_num_key_heads' is missing, which sizes"),
    ({"linear_conv_kernel_dim": 0}, "key 'linear_conv_kernel_dim' must be a whole number"),
    ({"linear_num_value_heads": 7}, "7 value heads over 2 key heads of linear attention"),
    ({"layer_types": ["full_attention"]}, "key 'layer_types' lists 1 layers and the model has 5"),
    ({"layer_types": ["mamba"] * 5}, "a layer of type 'mamba' is not supported"),
    ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
    ({"num_experts_per_tok": 9}, "each token to 9 of 6 experts"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_configs_that_cannot_be(changes: dict, message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LowbitError, match=re.escape(message)) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert "\n" not in str(caught.value) and (caught.value.code in ("E0216", "E0242"))


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("linear_value_head_dim", 64, "linear_attn.in_proj_qkvz"),
        ("linear_conv_kernel_dim", 5, "linear_attn.conv1d.weight"),
        ("head_dim", 16, "self_attn.q_norm"),
    ],
)
def test_numbers_that_contradict_the_weights(key: str, value: int, tensor: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LowbitError, match=re.escape(tensor)) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert "\n" not in str(caught.value)
