"""The packed cache: the bits of packing afresh, a file that is whole or not there, and never a stale one."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralForCausalLM

import models.test_deepseek as deepseek
import models.test_families as families
from forward_helpers import prompt_logits
from loading.test_online import PROMPT, make
from lowbit import loading
from lowbit.checkpoint import open_checkpoint
from lowbit.engine import idle
from lowbit.engine.load import load_engine
from lowbit.engine.memory import pool_pages
from lowbit.kernels import device_memory
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.rounded_output import RoundedOutput
from lowbit.loading import Loader, PackedCache, load_model, packed_cache
from lowbit.loading.packed_cache import Kept
from lowbit.loading.samples import Samples
from lowbit.models.model import Model
from lowbit.quantize.recipe import Asked
from lowbit.settings import Settings

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = [
    path.parent
    for path in sorted(FIXTURES.glob("*/*/config.json"))
    if json.loads(path.read_text()).get("architectures") == ["LlamaForCausalLM"]
]
GGUFS = sorted((FIXTURES / "gguf_families").glob("*.gguf"))
METHODS = ("fp8", "int4", "int8", "nvfp4", "mxfp4", "nf4", "hqq", "w8a8_int8", "fp8:activation=delayed")
GIB = 1 << 30


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[Loader]:
    """Every loader that ``load_model`` makes; and files of these tests count as settled."""
    made: list[Loader] = []

    class Noted(Loader):
        def __init__(self, *arguments: object, **more: object) -> None:
            super().__init__(*arguments, **more)  # type: ignore[arg-type]
            self.opened = arguments[0]
            made.append(self)

    monkeypatch.setattr(loading, "Loader", Noted)
    monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", -5.0)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "packed", GIB)


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, no weight may be read, quantized or packed."""

    def forbid() -> None:
        def never(*arguments: object, **more: object) -> None:
            raise AssertionError("a weight was read or packed")

        monkeypatch.setattr(Loader, "_read", never)
        monkeypatch.setattr(Loader, "_pack", never)

    return forbid


def bits(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def transform_bits(transform: InputTransform | None) -> object:
    if transform is None:
        return None
    values = {f.name: getattr(transform, f.name) for f in fields(transform) if f.name != "state"}
    values["rotation"] = rotation_bits(transform.rotation)
    return {name: bits(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def rotation_bits(rotator: Rotator | None) -> object:
    if rotator is None:
        return None
    rotation = rotator.rotation
    tensors = (rotation.before, rotation.after, rotation.matrix)
    return rotation.size, rotation.divisor, [bits(tensor) for tensor in tensors]


def module_bits(kept: Kept) -> object:
    weights = [
        (w.kernel.name, w.scheme, w.shape, w.origin, {name: bits(b) for name, b in w.buffers.items()})
        for w in kept.weights
    ]
    shared = [[a is b for b in kept.inputs] for a in kept.inputs]
    outputs = [
        transform_bits(output.codes) if isinstance(output, RoundedOutput) else rotation_bits(output)
        for output in kept.outputs
    ]
    return weights, [transform_bits(transform) for transform in kept.inputs], shared, bits(kept.bias), outputs


def same(first: Loader, second: Loader) -> None:
    """Both made the same modules, bit for bit."""
    assert list(first.made) == list(second.made) and first.made
    for name, kept in first.made.items():
        assert module_bits(kept) == module_bits(second.made[name]), name
    assert (first.kernels, first.packed_bytes) == (second.kernels, second.packed_bytes)


def files(cache: PackedCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir()) if cache.folder.exists() else []


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_format_comes_back_bit_for_bit(
    path: Path, cache: PackedCache, loaders: list[Loader], no_packing: Callable[[], None]
) -> None:
    header = open_checkpoint(str(path))
    fresh = load_model(header, device="cpu", packed_cache=cache)
    assert len(files(cache)) == 1 and fresh.mapped_bytes == 0
    no_packing()
    mapped = load_model(header, device="cpu", packed_cache=cache)
    same(*loaders)
    assert mapped.mapped_bytes == mapped.weight_bytes == fresh.weight_bytes
    assert mapped.quantization == fresh.quantization
    prompt = [token % fresh.vocab_size for token in PROMPT]
    assert bits(prompt_logits(mapped, [prompt])[0]) == bits(prompt_logits(fresh, [prompt])[0])


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_at_load_is_done_once(
    method: str,
    tmp_path: Path,
    cache: PackedCache,
    loaders: list[Loader],
    no_packing: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(tmp_path / "m")
    header = open_checkpoint(str(tmp_path / "m"))
    asked = Asked(method, ignore="o_proj")

    def load() -> Model:
        caplog.clear()
        return load_model(header, device="cpu", quantization=asked, packed_cache=cache)

    with caplog.at_level(logging.INFO, "lowbit"):
        fresh = load()
        said = [line for line in caplog.messages if " stays " in line]
        no_packing()
        mapped = load()
    same(*loaders)
    assert said and [line for line in caplog.messages if " stays " in line] == said
    assert len(mapped.states) == len(fresh.states)
    for _ in range(2):  # delayed scales change with every step
        assert bits(prompt_logits(mapped, [PROMPT])[0]) == bits(prompt_logits(fresh, [PROMPT])[0])


def test_experts_and_what_calibrated_methods_made(
    tmp_path: Path, cache: PackedCache, loaders: list[Loader], no_packing: Callable[[], None]
) -> None:
    make(tmp_path / "m", MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1)
    header = open_checkpoint(str(tmp_path / "m"))
    fresh = load_model(header, device="cpu", quantization="int4", packed_cache=cache)
    no_packing()
    mapped = load_model(header, device="cpu", quantization="int4", packed_cache=cache)
    same(*loaders)
    assert bits(prompt_logits(mapped, [PROMPT])[0]) == bits(prompt_logits(fresh, [PROMPT])[0])


FAMILIES = {
    **{case: lambda folder, case=case: families.make_checkpoint(case, folder) for case in families.CASES},
    **{
        case: lambda folder, case=case: deepseek.make_checkpoint(case, folder)
        for case in ("DeepseekV2 lite", "DeepseekV3", "DeepseekV2 native, biases")
    },
    **{path.name: lambda folder, path=path: folder.symlink_to(path) for path in GGUFS},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_for_bit(
    family: str, tmp_path: Path, cache: PackedCache, loaders: list[Loader]
) -> None:
    """Whatever its modules are called, no two have one name."""
    path = tmp_path / ("m.gguf" if family.endswith(".gguf") else "m")
    FAMILIES[family](path)
    fresh, mapped = load(path, cache), load(path, cache)
    same(*loaders)
    assert mapped.mapped_bytes == mapped.weight_bytes > 0
    assert bits(prompt_logits(mapped, [[1, 5, 7]])[0]) == bits(prompt_logits(fresh, [[1, 5, 7]])[0])


def test_the_embedded_model_as_a_server_loads_it(
    tmp_path: Path,
    embedded_path: Path,
    loaders: list[Loader],
    no_packing: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With kernels to be timed, whose samples are then cut from the mapped weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.setattr(idle, "READY_TOKENS", 0)
    settings = Settings(model=str(embedded_path), device="cpu", max_total_tokens=64, packed_cache="on")
    first = load_engine(settings, serving=True)
    assert all(first.idle_step() for _ in first.claim_scratch()) and first.idle_step()
    assert len(list((tmp_path / "lowbit" / "packed").iterdir())) == 1
    no_packing()
    progress: list[tuple[int, int, str]] = []
    second = load_engine(settings, lambda *news: progress.append(news), serving=True)
    same(*loaders)
    assert sum(iter(second.idle_step, False)) - sum(1 for _ in second.claim_scratch()) >= 4
    assert "q8_0 | 49152 x 576" in (tmp_path / "lowbit" / "kernel-timings.json").read_text()
    done = [number for number, _, _ in progress]
    assert done == sorted(done) and 0 < done[0] < done[-1] <= progress[-1][1]


def test_samples_of_mapped_weights_are_those_of_packed_ones(
    tmp_path: Path, cache: PackedCache, loaders: list[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.loading.samples.sample_rows", lambda shape: min(64, shape[-2]))
    make(tmp_path / "m")
    header = open_checkpoint(str(tmp_path / "m"))
    seen: list[dict[str, tuple[object, ...]]] = []
    for _ in range(2):
        samples = Samples()
        load_model(header, device="cpu", quantization="int4", packed_cache=cache, samples=samples)
        x = torch.linspace(-1, 1, 3 * 192).view(3, 192)
        seen.append(
            {
                sample.key: (count, sample.rows, sample.plain, bits(sample.run(x[:, : sample.shape[1]])))
                for sample, count in samples.counts.items()
            }
        )
    assert len(seen[0]) > 3 and seen[0] == seen[1]
    assert loaders[1].mapped_bytes


# --- whose file it is ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make(tmp_path / "m")
    return tmp_path / "m"


def load(path: Path, cache: PackedCache, **more: object) -> Model:
    return load_model(open_checkpoint(str(path)), device="cpu", packed_cache=cache, **more)  # type: ignore[arg-type]


def test_other_options_have_a_file_of_their_own(
    model: Path, cache: PackedCache, loaders: list[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, object]] = [
        {},
        {"quantization": "int4"},
        {"quantization": "int4:group_size=64"},
        {"quantization": Asked("int4", ignore="o_proj")},
        {"dtype": "bfloat16"},
        {"strict": True},
    ]
    for number, options in enumerate(kinds, 1):
        assert load(model, cache, **options).mapped_bytes == 0
        assert len(files(cache)) == number
    for options in kinds:
        assert load(model, cache, **options).mapped_bytes
    assert load(model, cache, kv_cache_dtype="int8").mapped_bytes, "no weight depends on it"
    monkeypatch.setattr("lowbit.kernels.cpu_dense.CpuDense.layout", 99)
    assert load(model, cache).mapped_bytes == 0, "another layout"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: os.utime(model / "model.safetensors", ns=(5, 5)),
        lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()),
        lambda model: (model / "notes.txt").write_text("a file that some format may read"),
        lambda model: (model / "config.json").write_text((model / "config.json").read_text() + " "),
    ],
    ids=["time", "written again", "another file beside it", "config"],
)
def test_a_checkpoint_that_changed_is_packed_again(
    change: Callable[[Path], None], model: Path, cache: PackedCache, loaders: list[Loader]
) -> None:
    load(model, cache)
    assert load(model, cache).mapped_bytes
    change(model)
    assert load(model, cache).mapped_bytes == 0
    assert len(files(cache)) == 2


def test_new_numbers_under_an_old_time_are_seen(
    model: Path, cache: PackedCache, loaders: list[Loader]
) -> None:
    """``cp -p``, ``rsync -t`` and ``touch -r`` restore size and time; the inode's own time they cannot."""
    file = model / "model.safetensors"
    before = file.stat()
    old = prompt_logits(load(model, cache), [PROMPT])[0]
    content = bytearray(file.read_bytes())
    content[-1000:] = bytes(1000)
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    new = prompt_logits(load(model, cache), [PROMPT])[0]
    assert not torch.equal(old, new)


def test_files_that_change_while_they_are_read_are_not_kept(
    model: Path,
    cache: PackedCache,
    loaders: list[Loader],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def touch(done: int, total: int, what: str) -> None:
        os.utime(model / "model.safetensors")

    with caplog.at_level(logging.INFO, "lowbit"):
        load(model, cache, on_progress=touch)
        assert files(cache) == []
        monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", 2.0)
        os.utime(model / "model.safetensors")
        load(model, cache)
        os.utime(model / "model.safetensors", (time.time() + 3600, time.time() + 3600))
        load(model, cache)
    assert files(cache) == []
    assert caplog.text.count("not kept: the model's files are being changed") == 3


def test_what_a_reader_noted_is_said_again(
    cache: PackedCache, loaders: list[Loader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    make(tmp_path / "m")
    plain_read = Loader._read

    def read(self: Loader, *arguments: object, **others: object) -> object:
        self.opened.notes.contradiction("E0214", f"the data say {self.done or 'no'} more")
        return plain_read(self, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Loader, "_read", read)
    load(tmp_path / "m", cache)
    assert caplog.text.count("warning[E0214]: the data say no more") == 1
    assert load(tmp_path / "m", cache).mapped_bytes
    assert caplog.text.count("warning[E0214]: the data say no more") == 2


# --- the file itself ----------------------------------------------------------------------------------------


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    half = len(content) // 2
    yield "empty", b""
    yield "cut in its first bytes", content[:20]
    yield "cut in its header", content[:100]
    yield "cut", content[:-1]
    yield "longer", content + b"\0"
    yield "half", content[:half]
    yield "of another kind", b"GGUF" + content[4:]
    yield "a byte of its header", content[:300] + bytes([content[300] ^ 1]) + content[301:]
    yield "an enormous header", content[:16] + b"\xff" * 8 + content[24:]


def test_a_damaged_file_is_made_again(
    model: Path, cache: PackedCache, loaders: list[Loader], caplog: pytest.LogCaptureFixture
) -> None:
    wanted = prompt_logits(load(model, cache, quantization="int4"), [PROMPT])[0]
    [name] = files(cache)
    file = cache.folder / name
    sound = file.read_bytes()
    for what, content in damaged(sound):
        caplog.clear()
        file.unlink()  # a mapped file is replaced, never rewritten
        file.write_bytes(content)
        found = load(model, cache, quantization="int4")
        assert found.mapped_bytes == 0, what
        assert f"{name} are damaged (" in caplog.text and "packed again" in caplog.text, what
        assert torch.equal(prompt_logits(found, [PROMPT])[0], wanted)
        assert file.read_bytes() == sound, what
    assert load(model, cache, quantization="int4").mapped_bytes


def rewritten(file: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Another header under a right checksum: a fault of lowbit's own, or somebody who means harm."""
    content = file.read_bytes()
    magic, length, _ = packed_cache._PREFIX.unpack(content[: packed_cache._PREFIX.size])
    start = packed_cache._PREFIX.size
    header = json.loads(content[start : start + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    first = packed_cache._first_buffer(length)
    assert packed_cache._first_buffer(len(text)) == first, "buffers stay where they are"
    digest = packed_cache.hashlib.sha256(text).digest()
    prefix = packed_cache._PREFIX.pack(magic, len(text), digest)
    file.unlink()
    file.write_bytes((prefix + text).ljust(first, b"\0") + content[first:])


def first_weight(header: dict) -> dict:
    return next(iter(header["modules"].values()))["weights"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(key="0" * 64),
        lambda header: header.pop("modules"),
        lambda header: header.update(modules=7),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(2, 10**9),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(2, -64),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(2, 1),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(1, [1]),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(1, [-1]),
        lambda header: first_weight(header)["buffers"]["data"].__setitem__(0, "F99"),
        lambda header: first_weight(header).update(kernel="none"),
        lambda header: first_weight(header).update(shape=[1, 1]),
        lambda header: first_weight(header)["scheme"].update({"class": "Popen"}),
        lambda header: first_weight(header)["scheme"].pop("weight"),
    ],
)
def test_a_header_that_says_nonsense(
    change: Callable[[dict], None],
    model: Path,
    cache: PackedCache,
    loaders: list[Loader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(model, cache)
    [name] = files(cache)
    rewritten(cache.folder / name, change)
    assert load(model, cache).mapped_bytes == 0
    assert "are damaged (" in caplog.text
    assert load(model, cache).mapped_bytes


def test_a_model_missing_from_the_file_is_packed(
    model: Path, cache: PackedCache, loaders: list[Loader]
) -> None:
    """Whatever a file lacks, nothing is served without it."""
    wanted = prompt_logits(load(model, cache), [PROMPT])[0]
    [name] = files(cache)
    rewritten(cache.folder / name, lambda header: header["modules"].pop("lm_head"))  # type: ignore[attr-defined]
    found = load(model, cache)
    assert 0 < found.mapped_bytes < found.weight_bytes
    assert torch.equal(prompt_logits(found, [PROMPT])[0], wanted)


def test_the_oldest_make_room(
    model: Path, cache: PackedCache, loaders: list[Loader], caplog: pytest.LogCaptureFixture
) -> None:
    load(model, cache)
    [first] = files(cache)
    size = (cache.folder / first).stat().st_size
    small = PackedCache(cache.folder, 2 * size + size // 2)
    (cache.folder / "part-left").write_bytes(b"x")
    os.utime(cache.folder / "part-left", (1, 1))
    (cache.folder / "part-new").write_bytes(b"x")
    (cache.folder / "mine.txt").write_text("not lowbit's")
    os.utime(cache.folder / first, (1, 1))
    load(model, small, strict=True)
    second = next(name for name in files(cache) if name.endswith(".packed") and name != first)
    os.utime(cache.folder / second, (2, 2))
    assert load(model, small).mapped_bytes, "and with it the first was used last"
    with caplog.at_level(logging.INFO, "lowbit"):
        load(model, small, dtype="float32", strict=True)
    left = files(cache)
    assert first in left and second not in left and len(left) == 4
    assert {"part-new", "mine.txt"} < set(left), "what a broken writer left a day ago goes, and no other"
    assert f"removed, used longest ago: {second}" in caplog.text
    tiny = PackedCache(cache.folder, size - 1)
    os.utime(model / "model.safetensors", ns=(7, 7))
    load(model, tiny)
    assert files(cache) == left, "what does not fit removes nothing"
    assert "and --packed-cache-gb allows" in caplog.text


def test_writing_that_fails_stops_nothing(
    model: Path, cache: PackedCache, loaders: list[Loader], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("no folder")
    load(model, PackedCache(tmp_path / "file" / "packed", GIB))
    assert "packed weights are not kept: Not a directory" in caplog.text

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    load(model, cache)
    assert "packed weights are not kept: No space left on device" in caplog.text and files(cache) == []
    monkeypatch.undo()
    monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", -5.0)
    usage = packed_cache.shutil.disk_usage(cache.folder)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: usage._replace(free=GIB))
    load(model, cache)
    assert "bytes are free" in caplog.text.replace("are free in", "bytes are free in") and files(cache) == []


# --- the option ---------------------------------------------------------------------------------------------


def test_what_the_option_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    assert Settings().packed_cache == "off" and PackedCache.asked("off", 64) is None
    assert PackedCache.asked("on", 64) == PackedCache(tmp_path / "packed", 64 << 30)
    assert PackedCache.asked("~/there", 0.5) == PackedCache(Path.home() / "there", 1 << 29)


def test_a_long_start_tells_of_the_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_LONG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "lowbit"):
        load_model(open_checkpoint(str(model)), device="cpu")
    assert "--packed-cache on keeps what was made of the weights" in caplog.text


def test_mapped_weights_are_no_room_for_the_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts them as memory that it could have back."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(device_memory, "_available", lambda: 100)
    numbers: dict[str, int | None] = {"max": None, "current": None}
    monkeypatch.setattr(device_memory, "_number", lambda file: numbers[file.rpartition(".")[2]])
    monkeypatch.setattr(device_memory, "_cached", lambda: 25)
    assert [device_memory.free_memory(cpu, mapped) for mapped in (0, 30, 200)] == [100, 70, 0]
    numbers.update(max=80, current=30)  # 25 of them files: of 30 that are mapped 5 are still to come
    assert [device_memory.free_memory(cpu, mapped) for mapped in (0, 20, 30)] == [50, 50, 45]
    asked: list[int] = []
    monkeypatch.setattr("lowbit.engine.memory.free_memory", lambda d, mapped: asked.append(mapped) or 1 << 40)

    class Mapped:
        device, context_length, mapped_bytes, others = cpu, 64, 12345, ()

        def cache_specs(self) -> list[object]:
            return [type("Spec", (), {"token_bytes": lambda self: 4})()]

    pool_pages(Mapped(), Settings())  # type: ignore[arg-type]
    assert asked == [12345]
