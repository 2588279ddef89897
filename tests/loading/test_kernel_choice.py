"""--linear-kernel and timings on disk through load_model and plan_model; tables are put in by hand."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from forward_helpers import prompt_logits
from kernel_inputs import ROUNDS_INPUTS
from loading.test_online import PROMPT, make
from lowbit.checkpoint import open_checkpoint
from lowbit.cli import main
from lowbit.engine import speed
from lowbit.engine.load import load_engine
from lowbit.errors import LowbitError
from lowbit.kernels import native, timing
from lowbit.kernels.timing import LayerSample, Seconds, TimingTable
from lowbit.layers.linear import Linear
from lowbit.loading import PackedCache, kernel_choice, load_model, packed_cache, plan_model
from lowbit.loading.kernel_choice import KernelRules, Wanted
from lowbit.models.model import Model
from lowbit.settings import Settings

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library was not built")

CPU = torch.device("cpu")
MXFP4 = "e2m1 1x32 e8m0"
OFF = 1e-3 if ROUNDS_INPUTS else 2e-2  # of a norm; without it a bf16 copy meets other inputs than codes do
COPIED = {(128, 192): "down_proj", (128, 128): "o_proj", (256, 128): "qkv_proj", (384, 128): "gate_up_proj"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table of timings will be; nothing may be timed."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(timing._Bench, "measure", never)
    return tmp_path / "cache" / kernel_choice.FILE


def put(cache: Path, *kinds: tuple[str, tuple[int, int], float], kernel: str = "cpu_blocks") -> None:
    """Timings on disk: (scheme, shape, how many times the time of bf16)."""
    table = TimingTable(cache, timing.machine(CPU, kernel_choice._version()))
    for scheme, shape, ratio in kinds:
        seconds = {tokens: Seconds(1e-3 * ratio, 1e-3, 2e-3) for tokens in (1, 32, 256)}
        table.add(LayerSample(kernel, scheme, shape, shape[0], lambda x: x), seconds)
    table.save()


def load(folder: Path, **how: object) -> Model:
    return load_model(open_checkpoint(str(folder)), device="cpu", **{"quantization": "mxfp4", **how})  # type: ignore[arg-type]


def kernels_of(folder: Path, **how: object) -> dict[str, str]:
    """The plan: module without its layer's number -> kernel."""
    plan = plan_model(open_checkpoint(str(folder)), device="cpu", **{"quantization": "mxfp4", **how})  # type: ignore[arg-type]
    return {module.name.rpartition(".")[2]: module.kernel for module in plan.modules}


@pytest.fixture
def linears(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Every layer that is made, without its number, and the kernels of its weights."""
    made: dict[str, list[str]] = {}

    class Noted(Linear):
        def __init__(self, name: str, weights: list, *more: object) -> None:  # type: ignore[type-arg]
            super().__init__(name, weights, *more)  # type: ignore[arg-type]
            made[name.rpartition(".")[2]] = [weight.kernel.name for weight in weights]

    monkeypatch.setattr("lowbit.loading.loader.Linear", Noted)
    return made


def test_rules() -> None:
    assert (
        KernelRules.parse("auto") == KernelRules() and KernelRules.parse("reference").default == "reference"
    )
    rules = KernelRules.parse("*.down_proj=cpu_dequantized, head=auto ,reference")
    wanted = {
        "model.layers.0.mlp.down_proj": Wanted(
            "model.layers.0.mlp.down_proj", "cpu_dequantized", "*.down_proj=cpu_dequantized"
        ),
        "model.layers.0.mlp.up_proj": Wanted("model.layers.0.mlp.up_proj", "reference", "reference"),
    }
    assert {name: rules.of(name, "linear") for name in wanted} == wanted
    assert rules.of("lm_head", "head").kernel == "auto"
    assert KernelRules.parse("re:.*=x.*=reference").rules == (("re:.*=x.*", "reference"),)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("marlin", "E0103", "there is no kernel 'marlin'; known: auto, gpu_blocks, gpu_columns, gpu_halves"),
        ("down_proj=", "E0103", "there is no kernel ''"),
        ("", "E0103", "there is no kernel ''"),
        ("=reference", "E0404", "a pattern of modules is empty"),
        ("re:(=reference", "E0404", "pattern 're:('"),
        ("reference,cpu_dense", "E0103", "reference and cpu_dense are both for all layers"),
    ],
)
def test_rules_without_sense(text: str, code: str, message: str, folder: Path) -> None:
    for ask in (load, kernels_of):
        with pytest.raises(LowbitError) as caught:
            ask(folder, linear_kernel=text)  # type: ignore[operator]
        assert caught.value.code == code and message in caught.value.message
    with pytest.raises(LowbitError, match="--linear-kernel"):
        load_engine(Settings(model="no such folder is looked at", linear_kernel=text))


def test_a_bare_name_is_for_the_layers_it_is_for(folder: Path, linears: dict[str, list[str]]) -> None:
    model = load(folder, linear_kernel="cpu_dequantized")
    copied = ["cpu_dequantized"]
    assert linears == {**dict.fromkeys(COPIED.values(), copied), "lm_head": ["cpu_dense"]}
    planned = kernels_of(folder, linear_kernel="cpu_dequantized")
    assert planned.pop("lm_head") == planned.pop("embed_tokens") == "cpu_dense"
    assert set(planned.values()) == {"cpu_dequantized"}
    packed = load(folder)
    assert model.kernels == {"cpu_dequantized", "cpu_dense"} and packed.kernels == {"cpu_blocks", "cpu_dense"}
    assert model.weight_bytes > packed.weight_bytes
    [mine], [other] = prompt_logits(model, [PROMPT]), prompt_logits(packed, [PROMPT])
    assert (mine - other).norm() < OFF * other.norm(), "mxfp4 is exact in bfloat16"


def test_planned_bytes_are_the_copy(folder: Path) -> None:
    plan = plan_model(
        open_checkpoint(str(folder)), device="cpu", quantization="int4", linear_kernel="cpu_dequantized"
    )
    down = next(module for module in plan.modules if module.name.endswith("down_proj"))
    assert (down.nbytes, down.by, down.computes) == (2 * 128 * 192, "by --linear-kernel", "bf16 copy")


def test_a_pattern_splits_what_would_be_fused(folder: Path, linears: dict[str, list[str]]) -> None:
    load(folder, linear_kernel="q_proj=cpu_dequantized,gate_up_proj=reference")
    assert linears["qkv_proj"] == ["cpu_dequantized", "cpu_blocks"]
    assert linears["gate_up_proj"] == ["reference"] and linears["down_proj"] == ["cpu_blocks"]
    planned = kernels_of(folder, linear_kernel="q_proj=cpu_dequantized,gate_up_proj=reference")
    assert (planned["q_proj"], planned["k_proj"], planned["up_proj"]) == (
        "cpu_dequantized",
        "cpu_blocks",
        "reference",
    )


def test_rules_about_nothing_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ask in (load, kernels_of):
        caplog.clear()
        ask(folder, linear_kernel="*.w1=reference,o_proj=auto,lm_head=cpu_dense,cpu_dequantized")  # type: ignore[operator]
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warned == [
            "lowbit: --linear-kernel *.w1=reference is about no layer of this model; lowbit inspect lists "
            "them"
        ]
    caplog.clear()
    load(folder, quantization=None, linear_kernel="cpu_dequantized")
    assert "--linear-kernel cpu_dequantized is about no layer" in caplog.text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "lm_head=cpu_blocks",
            "lm_head: --linear-kernel lm_head=cpu_blocks: cpu_blocks cannot run f32 (96 x 128): weights are "
            "not quantized; leave it out of the pattern, or auto",
        ),
        (
            "o_proj=cpu_dense",
            "model.layers.0.self_attn.o_proj: --linear-kernel o_proj=cpu_dense: cpu_dense cannot run "
            "e2m1 1x32 e8m0 (128 x 128): weights are quantized; leave it out of the pattern, or auto",
        ),
        (
            "o_proj=gpu_blocks",
            "model.layers.0.self_attn.o_proj: --linear-kernel o_proj=gpu_blocks: gpu_blocks cannot run "
            "e2m1 1x32 e8m0 (128 x 128): needs an NVIDIA GPU, got cpu; leave it out of the pattern, or auto",
        ),
    ],
)
def test_a_kernel_that_refuses(rule: str, message: str, folder: Path) -> None:
    for ask in (load, kernels_of):
        with pytest.raises(LowbitError) as caught:
            ask(folder, linear_kernel=rule)  # type: ignore[operator]
        assert (caught.value.code, caught.value.message) == ("E0414", message)
    assert caught.value.exit_code == 4


def test_a_bare_name_that_refuses(folder: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        load(folder, quantization="int7:group_size=8", linear_kernel="cpu_blocks")
    assert re.fullmatch(
        r"(model\.layers\.0\.self_attn\.\w+): --linear-kernel cpu_blocks: cpu_blocks cannot run uint7 1x8 "
        r"f16 asym \(\d+ x 128\): uint7 codes need groups of 16 or a multiple of 32, got 8; "
        r"use --linear-kernel cpu_blocks,\1=auto, or auto",
        caught.value.message,
    )
    others = ",".join(f"{name}_proj=auto" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    load(folder, quantization="int5:group_size=8", linear_kernel=f"cpu_blocks,{others}")


def test_the_table_decides(
    folder: Path, cache: Path, linears: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    put(cache, (MXFP4, (128, 192), 9.0), (MXFP4, (128, 128), 2.0), (MXFP4, (256, 128), 9.0))
    with caplog.at_level(logging.INFO, "lowbit"):
        load(folder, timings="kept")
    wanted = {"down_proj": "cpu_dequantized", "o_proj": "cpu_blocks", "qkv_proj": "cpu_dequantized"}
    assert {name: linears[name] for name in wanted} == {name: [kernel] for name, kernel in wanted.items()}
    assert linears["gate_up_proj"] == ["cpu_blocks"], "not timed yet"
    lines = [line for line in caplog.messages if "runs on" in line]
    assert (
        "lowbit: e2m1 1x32 e8m0 (128 x 192) runs on cpu_dequantized by timing; not cpu_blocks: 0.11x as fast "
        "with 1 token, 0.11x with 32, 0.11x with 256; not reference: unpacks at every call, and a row's last "
        "bit may depend on others (2 layers)"
    ) in lines
    assert any("(128 x 128) runs on cpu_blocks; not reference" in line for line in lines)
    assert len(lines) == 4
    planned = kernels_of(folder, timings="kept")
    assert planned["q_proj"] == planned["v_proj"] == planned["down_proj"] == "cpu_dequantized"
    assert planned["o_proj"] == planned["up_proj"] == "cpu_blocks"
    named = kernels_of(folder, timings="kept", linear_kernel="cpu_blocks")
    assert named["down_proj"] == "cpu_blocks", "a name beats the table"
    assert kernels_of(folder)["down_proj"] == "cpu_blocks", "nobody asked for the table"
    assert kernels_of(folder, timings="kept", threads=63)["down_proj"] == "cpu_blocks", "another machine's"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 4, "machines": {"here": 5}}', "\x00"])
def test_a_damaged_table_counts_for_nothing(text: str, folder: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert load(folder, timings="kept").kernels == {"cpu_blocks", "cpu_dense"}
    assert kernels_of(folder, timings="kept")["down_proj"] == "cpu_blocks"
    put(cache, (MXFP4, (128, 192), 9.0))
    document = json.loads(cache.read_text())
    next(iter(document["machines"].values()))[f"cpu_blocks | {MXFP4} | 128 x 192"]["1"] = [-1, 1]
    cache.write_text(json.dumps(document))
    assert load(folder, timings="kept").kernels == {"cpu_blocks", "cpu_dense"}


def test_the_choice_does_not_depend_on_the_batch(folder: Path, cache: Path) -> None:
    """A row has the same bits alone and beside others, though the table would choose otherwise for many."""
    table = TimingTable(cache, timing.machine(CPU, kernel_choice._version()))
    for number, shape in enumerate(COPIED):
        few, many = (9e-3, 1e-4) if number % 2 else (1e-4, 9e-3)
        seconds = {1: Seconds(few, 1e-3), 32: Seconds(many, 1e-3), 256: Seconds(many, 1e-3)}
        table.add(LayerSample("cpu_blocks", MXFP4, shape, shape[0], lambda x: x), seconds)
    table.save()
    model = load(folder, timings="kept")
    assert model.kernels == {"cpu_blocks", "cpu_dense", "cpu_dequantized"}
    prompts = [[(7 * n + k) % 96 for k in range(40)] for n in range(6)]
    together = prompt_logits(model, prompts)
    for prompt, expected in zip(prompts, together, strict=True):
        assert torch.equal(prompt_logits(model, [prompt])[0], expected)
        assert torch.equal(prompt_logits(model, [prompt[:1]])[0], expected[:1])


def test_experts_and_int8_inputs(tmp_path: Path) -> None:
    make(tmp_path, MixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2)
    model = load(tmp_path, linear_kernel="experts=cpu_dequantized")
    assert "cpu_dequantized" in model.kernels and "reference" not in model.kernels
    [mine], [other] = prompt_logits(model, [PROMPT]), prompt_logits(load(tmp_path), [PROMPT])
    assert (mine - other).norm() < OFF * other.norm()
    how = {"quantization": "int4", "activation_quantization": "int8"}
    plan = plan_model(
        open_checkpoint(str(tmp_path)), device="cpu", linear_kernel="experts=cpu_dequantized", **how
    )
    experts = [module for module in plan.modules if ".experts." in module.name]
    others = [module for module in plan.modules if module.name == "model.layers.0.self_attn.o_proj"]
    assert experts and all(module.scheme.activation is None for module in experts)
    assert others and all(module.scheme.activation is not None for module in others)


def test_missing_timings_are_taken_at_load_where_they_decide(
    folder: Path, cache: Path, linears: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[LayerSample] = []

    def measured(samples: list[LayerSample], table: TimingTable, device: torch.device) -> Iterator[None]:
        for sample in samples:
            asked.append(sample)
            x = torch.randn(3, sample.shape[1])
            assert sample.run(x).shape == (3, sample.rows)
            slow = 9.0 if sample.shape == (128, 192) else 1.0
            table.add(sample, {1: Seconds(slow, 1.0)})
            yield

    monkeypatch.setattr(kernel_choice, "measurements", measured)
    load(folder, timings="measured", quantization="int4")
    assert not asked, "a copy of int4 is rounded: there is nothing to choose"
    load(folder, timings="measured", linear_kernel="cpu_blocks")
    load(folder, timings="kept")
    assert not asked
    load(folder, timings="measured")
    assert sorted(sample.shape for sample in asked) == sorted(COPIED), "each kind once"
    assert linears["down_proj"] == ["cpu_dequantized"] and linears["o_proj"] == ["cpu_blocks"]
    assert f"cpu_blocks | {MXFP4} | 128 x 192" in cache.read_text(), "kept for the next start"
    load(folder, timings="measured")
    assert len(asked) == 4
    cache.unlink()
    monkeypatch.setattr(kernel_choice, "_SECONDS", -1.0)
    load(folder, timings="measured")
    assert len(asked) == 4, "no time is left"


@pytest.mark.parametrize(
    ("setting", "serving", "expected"),
    [
        *(("auto", True, "measured"), ("auto", False, "kept"), ("on", False, "measured")),
        *(("off", True, "unused"), ("off", False, "unused")),
    ],
)
def test_when_timings_count(setting: str, serving: bool, expected: str) -> None:
    assert speed.timings_for(setting, serving) == expected


def test_packed_weights_are_packed_again_for_another_kernel(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", -5.0)
    kept = PackedCache(tmp_path / "packed", 1 << 30)

    def start(**how: object) -> Model:
        return load(folder, packed_cache=kept, timings="kept", **how)

    def mapped(model: Model) -> bool:
        return model.mapped_bytes == model.weight_bytes

    assert not mapped(start()) and mapped(start())
    put(cache, (MXFP4, (128, 192), 9.0))
    changed = start()
    assert "cpu_dequantized" in changed.kernels and 0 < changed.mapped_bytes < changed.weight_bytes
    again = start()
    assert mapped(again) and again.kernels == changed.kernels
    assert torch.equal(*(prompt_logits(model, [PROMPT])[0] for model in (again, changed)))
    named = start(linear_kernel="cpu_blocks")
    assert not mapped(named) and "cpu_dequantized" not in named.kernels
    assert mapped(start(linear_kernel="cpu_blocks")) and mapped(start()), "a file each"


def test_the_engine_and_inspect_take_the_same_flag(
    cache: Path, embedded_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "down_proj=cpu_dequantized"
    settings = Settings(model=str(embedded_path), device="cpu", max_total_tokens=64, linear_kernel=rule)
    assert load_engine(settings).ready().details["linear layers"] == "cpu_blocks, cpu_dequantized"
    put(cache, ("q4_1", (576, 576), 2.0), ("q4_1", (3072, 576), 0.5))
    asked = ["inspect", str(embedded_path), "--device", "cpu", "--linear-kernel", rule]
    assert main([*asked, "--json"]) == 0
    modules = {
        m["name"].rpartition("layers.0.")[2]: m for m in json.loads(capsys.readouterr().out)["modules"]
    }
    down, out = modules["mlp.down_proj"], modules["self_attn.o_proj"]
    assert (down["kernel"], down["chosen"]) == ("cpu_dequantized", "by --linear-kernel")
    assert (out["kernel"], out["chosen"]) == ("cpu_blocks", "by preference")
    assert out["times_as_fast_as_bf16"] == {"1": 0.5, "32": 0.5, "256": 0.5}
    assert modules["mlp.gate_proj"]["times_as_fast_as_bf16"]["1"] == 2.0, "fused with up_proj"
    assert {loser["kernel"]: loser["reason"] for loser in out["losers"]} == {
        "reference": "unpacks at every call, and a row's last bit may depend on others",
        "cpu_dequantized": "rounds the weights to bfloat16, 2.0x as fast with 1 token, 2.0x with 32, 2.0x "
        "with 256, 3.2x the memory",
    }
    assert main(asked) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "by --linear-kernel: mlp.down_proj on cpu_dequantized" in text
    assert (
        "slower than bf16: self_attn.o_proj on cpu_blocks: 0.5x with 1, 0.5x with 32, 0.5x with 256" in text
    )
    assert "not cpu_dequantized: rounds the weights to bfloat16, 2.0x as fast with 1 token" in text
    assert main([*asked, "--kernel-timings", "off"]) == 0
    assert "no layer was timed here yet" in capsys.readouterr().out


def test_inspect_times_only_when_asked(
    cache: Path, embedded_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing._Bench, "measure", lambda *_: {1: Seconds(1.0, 2.5, 3.0)})
    show: Callable[[], int] = lambda: main(["inspect", str(embedded_path), "--device", "cpu", "--time"])  # noqa: E731
    assert show() == 0
    assert "2.5" in capsys.readouterr().out and "576 x 1536" in cache.read_text()
