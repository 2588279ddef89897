"""Samples of a tiny model's layers, and what is said of their speed at start."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralForCausalLM

from loading.test_online import make
from lowbit.checkpoint import open_checkpoint
from lowbit.engine import idle, speed
from lowbit.engine.load import load_engine
from lowbit.errors import LowbitError
from lowbit.kernels import timing
from lowbit.kernels.timing import LayerSample, Seconds, TimingTable
from lowbit.loading import kernel_choice, load_model
from lowbit.loading.samples import Samples
from lowbit.settings import Settings

CPU = torch.device("cpu")


def samples_of(folder: Path, quantization: str | None = None) -> dict[LayerSample, int]:
    samples = Samples()
    load_model(open_checkpoint(str(folder)), device="cpu", quantization=quantization, samples=samples)
    return samples.counts


def test_every_kind_once_with_its_count(tmp_path: Path) -> None:
    make(tmp_path)
    found = {(kind.scheme, kind.shape): count for kind, count in samples_of(tmp_path, "int4").items()}
    scheme = "uint4 1x128 f16 asym"
    assert found == {
        (scheme, (256, 128)): 2,  # q, k and v
        (scheme, (128, 128)): 2,
        (scheme, (384, 128)): 2,  # gate and up
        ("uint4 1x64 f16 asym", (128, 192)): 2,
        ("f32", (96, 128)): 1,  # the head; the embedding is looked up, not multiplied with
    }
    tied = tmp_path / "tied"
    make(tied, tie_word_embeddings=True)
    assert (("f32", (96, 128)), 1) in [((k.scheme, k.shape), n) for k, n in samples_of(tied).items()]


def test_what_a_bf16_copy_might_run(tmp_path: Path) -> None:
    """Quantized weights whose inputs stay as they are, and that are none yet."""

    def copies(quantization: str | None, **how: object) -> dict[str, bool]:
        samples = Samples()
        how |= {"quantization": quantization, "samples": samples}
        load_model(open_checkpoint(str(tmp_path)), device="cpu", **how)  # type: ignore[arg-type]
        return {kind.scheme: kind.copies for kind in samples.counts if kind.shape in ((96, 128), (128, 128))}

    make(tmp_path)
    assert copies("int4") == {"uint4 1x128 f16 asym": True, "f32": False}
    assert not any(copies("w8a8_int8").values())
    assert not any(copies("int4", linear_kernel="cpu_dequantized").values())


def test_experts_count(tmp_path: Path) -> None:
    make(tmp_path, MixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2)
    found = {(kind.scheme, kind.shape): count for kind, count in samples_of(tmp_path, "w8a8_int8").items()}
    inputs = "int8 1xall f32 (input int8 1xall dynamic)"
    assert found[inputs, (384, 128)] == found[inputs, (128, 192)] == 8
    assert found["f32", (4, 128)] == 2, "routers"


@pytest.mark.parametrize("method", ["int4:group_size=32", "w8a8_int8", "fp8:weights=block", "nvfp4", "int3"])
def test_a_sample_computes_what_the_layers_first_rows_do(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, LlamaForCausalLM, hidden_size=256, intermediate_size=512, vocab_size=400)
    whole = {(kind.scheme, kind.shape): kind for kind in samples_of(tmp_path, method)}
    monkeypatch.setattr(timing, "SAMPLE_WEIGHTS", 128 * 256)
    short = samples_of(tmp_path, method)
    assert {(kind.scheme, kind.shape) for kind in short} == set(whole)
    cut = [kind for kind in short if kind.rows < kind.shape[0]]
    assert cut and all(kind.rows == 128 for kind in cut)
    for kind in cut:
        x = torch.randn(3, kind.shape[1], generator=torch.Generator().manual_seed(1))
        expected = whole[kind.scheme, kind.shape].run(x.clone())[:, : kind.rows]
        assert torch.equal(kind.run(x), expected)


@pytest.mark.parametrize(
    ("setting", "serving", "expected"),
    [("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False)],
)
def test_when_it_is_wanted(setting: str, serving: bool, expected: bool) -> None:
    assert speed.wanted(setting, serving) is expected


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.setattr(timing, "_SWEEP_BYTES", 64)
    return tmp_path / "lowbit" / kernel_choice.FILE


def known(cache: Path, kinds: dict[LayerSample, int], **ratios: float) -> Samples:
    """Samples whose timings are in the file already: kernel -> how many times as fast as bf16."""
    table = TimingTable(cache, timing.machine(CPU, kernel_choice._version()))
    samples = Samples()
    for kind, count in kinds.items():
        ratio = ratios[kind.kernel]
        table.add(kind, {1: Seconds(1e-3, 1e-3 * ratio, 1.0), 256: Seconds(1e-3, 1.0, 2e-3 * ratio)})
        samples.counts[kind] = count
    table.save()
    return samples


def kind_of(kernel: str, scheme: str) -> LayerSample:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("measured again")

    return LayerSample(kernel, scheme, (64, 32), 64, never)


def test_what_the_log_says(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {kind_of("cpu_blocks", "int4 1x128 f16"): 7, kind_of("reference", "q9 odd"): 1}
    samples = known(cache, kinds, cpu_blocks=2.1, reference=0.25)
    with caplog.at_level(logging.INFO, "lowbit"):
        speed.say_speed(samples, CPU, strict=False)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "lowbit: int4 1x128 f16 (64 x 32) on cpu_blocks: 2.1x bf16 with 1 token, 4.2x with 256"),
        ("INFO", "lowbit: q9 odd (64 x 32) on reference: 0.25x bf16 with 1 token, 0.5x with 256"),
        (
            "WARNING",
            "lowbit: q9 odd on reference is slower than bf16: 0.25x with 1 token; no fast kernel takes it "
            "here (lowbit inspect says why), the reference kernel needs 4.0 times as long; use the "
            "unquantized model with --quantization int8",
        ),
        (
            "WARNING",
            "lowbit: q9 odd on reference is slower than bf16: 0.5x with 256 tokens; no fast kernel takes it "
            "here (lowbit inspect says why), the reference kernel needs 2.0 times as long; use the "
            "unquantized model with --quantization int8",
        ),
    ]


def test_strict_refuses_what_is_slower(cache: Path) -> None:
    samples = known(cache, {kind_of("cpu_blocks", "int3 1x16 f32"): 1}, cpu_blocks=0.5)
    with pytest.raises(LowbitError) as caught:
        speed.say_speed(samples, CPU, strict=True)
    assert caught.value.code == "E0413" and caught.value.exit_code == 4
    assert caught.value.message == (
        "int3 1x16 f32 on cpu_blocks is slower than bf16: 0.5x with 1 token; use the unquantized model, as "
        "it is or with another --quantization (int8, int4), or drop --strict"
    )
    fast = known(cache, {kind_of("cpu_blocks", "int4 1x16 f32"): 1}, cpu_blocks=1.5)
    speed.say_speed(fast, CPU, strict=True)


def test_torch_faster_in_bf16_and_a_copy_that_would_be(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said, and no reason to refuse a model: there is no other way to run bf16."""
    bf16 = replace(kind_of("cpu_dense", "bf16"), plain=True)
    samples = known(cache, {bf16: 1}, cpu_dense=0.5)
    speed.say_speed(samples, CPU, strict=True)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "lowbit: bf16 on cpu_dense is slower than torch's bf16: 0.5x with 1 token; torch's rows depend on "
        "the batch they are computed in, so it is not used"
    ]
    caplog.clear()
    nf4 = replace(kind_of("cpu_blocks", "nf4"), copies=True)
    speed.say_speed(known(cache, {nf4: 1}, cpu_blocks=0.5), CPU, strict=False)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "lowbit: nf4 on cpu_blocks is slower than bf16: 0.5x with 1 token; --linear-kernel cpu_dequantized "
        "is 2.0x as fast with 1 token, and holds these weights in bfloat16 (lowbit inspect says in how much "
        "more memory); or use the unquantized model, as it is or with another --quantization (int8, int4)"
    ]


def test_a_cache_that_cannot_be_written_stops_nothing(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_text("a file where the folder should be")
    samples = Samples()
    samples.counts[LayerSample("k", "s", (4, 32), 4, lambda x: x)] = 1
    with caplog.at_level(logging.INFO, "lowbit"):
        speed.say_speed(samples, CPU, strict=False)
    assert "kernel timings are not kept: " in caplog.text and "s (4 x 32) on k: " in caplog.text


def test_the_engine_times_only_where_asked(
    cache: Path, embedded_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server when nobody waits for it, but before it is ready where the result may refuse the model."""
    monkeypatch.setattr(idle, "READY_TOKENS", 0)
    settings = {"model": str(embedded_path), "device": "cpu", "max_total_tokens": 64}
    assert not load_engine(Settings(**settings)).idle_step()
    assert not cache.exists()
    engine = load_engine(Settings(**settings), serving=True)
    assert not cache.exists(), "ready first"
    claims = sum(1 for _ in engine.claim_scratch())
    assert 4 <= sum(iter(engine.idle_step, False)) - claims <= 10, "a kind of layer each, some twice"
    assert "q4_1 | 576 x 1536" in cache.read_text()
    cache.unlink()
    with contextlib.suppress(LowbitError):  # who knows how fast this machine is
        load_engine(Settings(**settings, strict=True), serving=True)
    assert "q4_1 | 576 x 1536" in cache.read_text()


def test_a_failure_when_idle_is_a_line_in_the_log(
    cache: Path, embedded_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "READY_TOKENS", 0)
    settings = {"model": str(embedded_path), "device": "cpu", "max_total_tokens": 64}
    engine = load_engine(Settings(**settings))

    def fails() -> Iterator[None]:
        yield
        raise MemoryError("no room")

    engine.when_idle(fails())
    assert [engine.idle_step() for _ in range(3)] == [True, False, False]
    assert caplog.text.count("failed: MemoryError('no room')") == 1
