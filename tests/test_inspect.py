"""``lowbit inspect``: the plan of a stand-in model, in words and as JSON."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowbit.checkpoint
from lowbit.cli import main
from lowbit.kernels import Loser
from lowbit.numerics.llm_int8 import llm_int8_inputs
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay
from lowbit.quantize.recipe import Asked

KIB = 1024


class Named(str):
    """A scheme that is only its name, and perhaps what it asks of inputs."""

    activation: ActivationScheme | None = None

    @property
    def is_dense(self) -> bool:
        return self in ("bf16", "f16", "f32")


def module(name: str, scheme: str, nbytes: int, kernel: str, *refusals: tuple[str, str]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        shape=(64, 48),
        scheme=Named(scheme),
        kernel=kernel,
        computes="as stored",
        refusals=refusals,
        nbytes=nbytes,
        reason="",
        error=None,
        losers=(),
        by="",
        ratios=(),
        cut="",
    )


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A model of two layers, the second layer's down_proj in another scheme; the calls of plan_model."""
    odd = ("fast", "needs in % 64 == 0, got 48")
    plan = SimpleNamespace(
        architecture="LlamaForCausalLM",
        format="gguf",
        described="gguf, Q4_1 and others",
        choice="",
        peak_bytes=20 * KIB,
        device="cpu",
        config=SimpleNamespace(layers=2, hidden_size=48, heads=6, kv_heads=2, vocab_size=64),
        parameters=5 * 64 * 48,
        context_length=512,
        weight_bytes=12 * KIB,
        screen_bytes=0,
        no_screen="",
        kv_bytes_per_token=256,
        state_bytes=0,
        modules=[
            module("model.embed_tokens", "bf16", 6 * KIB, "dense"),
            module("model.layers.0.self_attn.q_proj", "Q4_1", KIB, "fast"),
            module("model.layers.0.mlp.down_proj", "Q4_1", KIB, "fast"),
            module("model.layers.1.self_attn.q_proj", "Q4_1", KIB, "fast"),
            module("model.layers.1.mlp.down_proj", "Q6_K", 3 * KIB, "slow", odd, ("dense", "not [dense]")),
        ],
    )
    calls: list[dict[str, object]] = []

    def plan_model(header: object, **how: object) -> SimpleNamespace:
        calls.append({"header": header, **how})
        return plan

    monkeypatch.setattr("lowbit.loading.plan_model", plan_model)
    opened = lambda name, revision, on_progress, **how: nullcontext((name, revision))  # noqa: E731
    monkeypatch.setattr("lowbit.checkpoint.hub_headers.opened_headers", opened)
    return calls


def test_words(planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/m", "--revision", "v1", "--device", "cpu", "--tokens", "100"]) == 0
    assert planned == [
        {
            "header": ("org/m", "v1"),
            "device": "cpu",
            "dtype": "auto",
            "kv_cache_dtype": "auto",
            "k_cache_dtype": "auto",
            "v_cache_dtype": "auto",
            "activation_quantization": "none",
            "kv_scales_path": None,
            "quantization": Asked(),
            "strict": False,
            "linear_kernel": "auto",
            "lm_head_screen": "auto",
            "timings": "kept",
            "threads": None,
            "tp_size": 1,
        }
    ]
    text = capsys.readouterr().out
    assert "org/m: LlamaForCausalLM, gguf, Q4_1 and others" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert cells == [
        ["1", "embed_tokens", "64 x 48", "bf16", "6.0 KiB", "dense", "as stored"],
        ["2", "self_attn.q_proj", "64 x 48", "Q4_1", "2.0 KiB", "fast", "as stored"],
        ["1", "mlp.down_proj", "64 x 48", "Q4_1", "1.0 KiB", "fast", "as stored"],
        ["1", "mlp.down_proj", "64 x 48", "Q6_K", "3.0 KiB", "slow", "as stored"],
    ]
    assert "not fast: needs in % 64 == 0, got 48 (mlp.down_proj)" in text
    assert "not dense: not [dense] (mlp.down_proj)" in text, "square brackets are text, not markup"
    assert "weights 12.0 KiB + KV cache 25.0 KiB for 100 tokens (256 B a token) = 37.0 KiB" in text
    assert "about 20.0 KiB at the peak of loading" in text
    assert "not quantized: model.embed_tokens\n" in text
    assert "x bf16: no layer was timed here yet; lowbit serve does, and lowbit inspect --time" in text


def test_json(planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/m", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens"], plan["kv_bytes"]) == (512, 512 * 256), "the model's longest context"
    assert plan["ignored_layers"] == ["model.embed_tokens"] and plan["peak_bytes_at_load"] == 20 * KIB
    assert plan["total_bytes"] == 12 * KIB + 512 * 256
    assert [m["name"] for m in plan["modules"]][-1] == "model.layers.1.mlp.down_proj"
    assert plan["modules"][-1]["refusals"] == [
        {"kernel": "fast", "reason": "needs in % 64 == 0, got 48"},
        {"kernel": "dense", "reason": "not [dense]"},
    ]


def test_what_else_would_run_a_layer(
    planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen, not chosen and why, slower than bf16: as the plan says, each reason once."""
    from lowbit.loading import plan_model

    made: Any = plan_model  # the stand-in's
    _, first_q, first_down, second_q, second_down = made(None).modules
    copy = Loser("copy", "rounds the weights")
    for each in (first_q, second_q, first_down, second_down):
        each.losers = (copy,)
    for each in (first_q, second_q):
        each.ratios = ((1, 3.0), (32, 0.95), (256, 0.5))
    second_down.by = "by --linear-kernel"
    assert main(["inspect", "org/m"]) == 0
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert [row[-1] for row in cells] == ["", "3 0.95 0.5", "", ""]
    text = " ".join(text.split())
    assert "not copy: rounds the weights (self_attn.q_proj, mlp.down_proj)" in text
    assert "by --linear-kernel: mlp.down_proj on slow" in text
    assert "slower than bf16: self_attn.q_proj on fast: 0.5x with 256 " in text
    assert "x bf16: times as fast as the same layer in bf16 with 1, 32 and 256 tokens" in text
    assert main(["inspect", "org/m", "--json", "--threads", "3", "--kernel-timings", "off"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    assert modules[1]["times_as_fast_as_bf16"] == {"1": 3.0, "32": 0.95, "256": 0.5}
    assert modules[1]["losers"] == [{"kernel": "copy", "reason": "rounds the weights"}]
    assert [m["chosen"] for m in modules[3:]] == ["by preference", "by --linear-kernel"]
    assert (planned[-1]["threads"], planned[-1]["timings"]) == (3, "unused")


def test_modules_that_depend_on_the_batch(
    planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named with their reasons; what has a scale a token, or a static one, is not."""
    from lowbit.loading import plan_model

    e4m3 = number_format("e4m3")
    inputs = [
        ActivationScheme(e4m3, (1, 0)),
        llm_int8_inputs(),
        ActivationScheme(e4m3, (0, 0)),
        llm_int8_inputs(5.0),
        ActivationScheme(e4m3, (0, 0), "delayed", delay=Delay()),
    ]
    made: Any = plan_model  # the stand-in's
    modules = made(None).modules
    for module, scheme in zip(modules, inputs, strict=True):
        module.scheme = Named(module.scheme)
        module.scheme.activation = scheme
    assert main(["inspect", "org/m"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    columns = "LLM.int8's outlier columns are those of all tokens of a step"
    assert f"results depend on the batch: self_attn.q_proj ({columns})" in text
    assert "results depend on the batch: mlp.down_proj (one dynamic scale for all tokens of a step)" in text
    assert "mlp.down_proj (delayed scales follow the inputs of earlier steps)" in text
    assert text.count("depend on the batch") == 3
    assert main(["inspect", "org/m", "--json"]) == 0
    told = [module["depends_on_batch"] for module in json.loads(capsys.readouterr().out)["modules"]]
    assert told[0] is None and told[1] == told[3] == columns and all(told[1:])
    for scheme in (llm_int8_inputs(0.0), ActivationScheme(e4m3, (0, 0), "static")):
        assert not scheme.depends_on_batch


@pytest.mark.parametrize("tokens", ["0", "-1", "1e3", "many", ""])
def test_bad_token_counts(
    planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str], tokens: str
) -> None:
    assert main(["inspect", "org/m", f"--tokens={tokens}"]) == 2
    expected = f"lowbit: error[E0103]: --tokens must be a whole number from 1, got {tokens!r}\n"
    assert capsys.readouterr().err == expected
    assert not planned


def test_context_length_is_the_default_for_the_cache(
    planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "m", "--context-length", "8"]) == 0
    assert "KV cache 2.0 KiB for 8 tokens" in capsys.readouterr().out


def test_pull_says_where_the_model_lies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    header = SimpleNamespace(root=tmp_path, tensors={"a": 1, "b": 2}, nbytes=3 << 20, revision="abc")
    opened = lambda name, revision, on_progress, **how: on_progress(1, 2, "x") or header  # noqa: E731
    monkeypatch.setattr(lowbit.checkpoint, "open_checkpoint", opened, raising=False)
    assert main(["pull", "org/m"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"org/m at abc: 2 tensors, 3.0 MiB, in {tmp_path}\n"
    assert captured.err == "", "no bar where stderr is no terminal"


def test_how_ranks_share_a_model(
    planned: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    from lowbit.loading import plan_model

    made: Any = plan_model  # the stand-in's
    modules = made(None).modules
    modules[1].cut = modules[3].cut = "rows 32 | 32"
    modules[2].cut, modules[4].cut = "columns 32 | 16 in groups of 16", "columns 24 | 24"
    planned.clear()
    assert main(["inspect", "org/m", "--tp-size", "2", "--device", "cpu"]) == 0
    assert planned[0]["tp_size"] == 2
    words = " ".join(capsys.readouterr().out.split())
    assert "2 ranks share the model" in words
    for line in ("rows 32 | 32: self_attn.q_proj", "columns 32 | 16 in groups of 16: mlp.down_proj"):
        assert line in words
    assert "columns 24 | 24: mlp.down_proj" in words and "inputs are quantized" not in words
    modules[4].scheme.activation = ActivationScheme(number_format("int8"), (1, 0))
    assert main(["inspect", "org/m", "--tp-size", "2", "--device", "cpu"]) == 0
    assert "inputs are quantized, from sums" in " ".join(capsys.readouterr().out.split())
