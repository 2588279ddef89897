"""Conversions prove themselves, can be gone on with, and quantize anew only where they are asked to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.helpers import FIXTURES
from forward_helpers import prompt_logits
from loading.test_online import make as make_float32
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.checkpoint.journal import JOURNAL, FileJournal
from lowbit.checkpoint.safetensors_writer import ShardedWriter
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.cli import main
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredModule
from lowbit.formats.compressed_tensors_writer import CompressedTensorsWriter, reciprocal
from lowbit.loading import load_model
from lowbit.loading.convert import Conversion, convert, summary
from lowbit.loading.opened import Opened
from lowbit.loading.quantizing import Quantizing, _Module
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.quantize.calibration import Calibration
from lowbit.quantize.recipe import Asked

GPTQ = FIXTURES / "gptq" / "w4_sym"
SHARD = 3000  # bytes: the fixture becomes a handful of shards


def certificate_of(out: Path) -> dict:
    return json.loads((out / CERTIFICATE).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but the certificate, which has a date."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CERTIFICATE}


def test_certificate(tmp_path: Path) -> None:
    convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out")
    told = certificate_of(tmp_path / "out")
    assert told["exact"] and told["source"]["format"] == "gptq"
    source = SourceModel(open_checkpoint(str(GPTQ)))
    assert list(told["modules"]) == [module.place.part.name for module in source.modules]
    assert all("largest_error" not in one for one in told["modules"].values())
    report = examine(tmp_path / "out", canary=False).report
    assert not [finding for finding in report.findings if finding.rule in ("D001", "D006")]
    shard = tmp_path / "out" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "D006" in [finding.rule for finding in examine(tmp_path / "out", canary=False).report.findings]
    # The certificate is of this folder: what is made of it has its own.
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    data[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    convert(open_checkpoint(str(tmp_path / "copy")), "gptq", tmp_path / "back")
    assert certificate_of(tmp_path / "back")["source"]["name"] == "copy"
    modules = certificate_of(tmp_path / "back")["modules"]
    assert {k: v["sha256"] for k, v in modules.items()} == {
        k: v["sha256"] for k, v in told["modules"].items()
    }


@pytest.mark.parametrize("part", ["codes", "scales", "bias", "code order"])
def test_a_wrong_writer_is_found_out(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one module, changed on its way into the file: read back, and nothing is kept."""
    real = CompressedTensorsWriter.write

    def wrong(
        self: CompressedTensorsWriter,
        module: StoredModule,
        weight: QuantizedTensor,
        bias: torch.Tensor | None = None,
        input: InputRule | None = None,
    ) -> dict[str, torch.Tensor]:
        found = real(self, module, weight, bias, input)
        if module.name.endswith("k_proj"):
            suffix = {"scales": "weight_scale", "bias": "bias"}.get(part, "weight_packed")
            stored = found[module.tensor(suffix)] = found[module.tensor(suffix)].clone()
            if part == "code order":
                found[module.tensor(suffix)] = stored.flip(0)
            else:
                stored.view(-1)[0] += 1
        return found

    monkeypatch.setattr(CompressedTensorsWriter, "write", wrong)
    with pytest.raises(LowbitError, match=r"k_proj changed") as caught:
        convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out")
    assert caught.value.code == "E0707"
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """What stops a run as a signal does."""


def dying(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], None]:
    """The ``count``-th sync or rename stops the run; what was written stays as it is."""
    calls = iter(range(1, 1 << 30))

    def wrapped(real: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **more: object) -> object:
            if next(calls) == count:
                raise Killed
            return real(*words, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "ftruncate"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        yield


@pytest.mark.parametrize("source", [GPTQ, FIXTURES / "mxfp4" / "gpt_oss"], ids=["layers", "stacks"])
def test_stopped_anywhere_and_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every sync and rename: absent or whole, and the second run gives the bytes of an undisturbed one."""
    form = "compressed-tensors" if source == GPTQ else "mxfp4"

    def run(out: Path) -> Conversion:
        return convert(open_checkpoint(str(source)), form, out, shard_bytes=SHARD)

    run(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    shards = len([name for name in wanted if name.endswith(".safetensors")])
    assert shards > 4
    count, most = 0, 0
    while True:
        count += 1
        out = tmp_path / f"out{count}"
        context = dying(monkeypatch, count)
        next(context)
        try:
            run(out)
        except Killed:
            pass
        else:
            next(context, None)
            break
        next(context, None)
        partial = out.with_name(f"{out.name}.partial")
        assert out.exists() or not (partial / JOURNAL).exists() or partial.exists()
        if not out.exists():
            done = run(out)
            most = max(most, done.resumed)
        assert contents(out) == wanted or (out / "lowbit-writes-here.json").exists(), count
        assert not partial.exists()
        told = certificate_of(out)
        assert told["exact"] and told["modules"] == certificate_of(tmp_path / "whole")["modules"]
        shutil.rmtree(out)
    assert count > 20 and most == shards


def stopped(out: Path, monkeypatch: pytest.MonkeyPatch, shard: int = 3, **more: object) -> None:
    """A run that ends after so many shards."""
    real = ShardedWriter._settle

    def settle(self: ShardedWriter, one: object) -> None:
        real(self, one)
        if self._told == shard:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "_settle", settle)
        with pytest.raises(KeyboardInterrupt):
            convert(
                open_checkpoint(str(more.pop("source", GPTQ))), "compressed-tensors", out, shard_bytes=SHARD
            )


def test_finished_shards_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "out", monkeypatch)
    partial = tmp_path / "out.partial"
    assert "D007" in [finding.rule for finding in examine(partial, canary=False).report.findings]
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-0000[123].*")}
    assert len(times) == 3
    done = convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out", shard_bytes=SHARD)
    assert done.resumed == 3 and any("3 shards were finished" in line for line in summary(done))
    after = {path.name[:11]: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("model-0000[123]-*")}
    assert after == {name[:11]: time for name, time in times.items()}


def test_a_shard_that_changed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "out", monkeypatch)
    shard = tmp_path / "out.partial" / "model-00002.safetensors.tmp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with open(tmp_path / "out.partial" / JOURNAL, "a") as file:
        file.write('{"shard": "model-00004.saf')  # a line cut off
    done = convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out", shard_bytes=SHARD)
    assert done.resumed == 1
    convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "whole", shard_bytes=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_sources_and_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    shutil.copytree(GPTQ, source)
    out = tmp_path / "out"
    stopped(out, monkeypatch, source=source)
    for form, shard, what in (
        ("dense", SHARD, r"another --format \(compressed-tensors then, dense now\)"),
        ("compressed-tensors", 4000, r"another shard size \(3000 then, 4000 now\)"),
    ):
        with pytest.raises(LowbitError, match=what) as caught:
            convert(open_checkpoint(str(source)), form, out, shard_bytes=shard)
        assert caught.value.code == "E0304"
    weights = source / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(LowbitError, match="another source"):
        convert(open_checkpoint(str(source)), "compressed-tensors", out, shard_bytes=SHARD)
    assert len(list((tmp_path / "out.partial").glob("model-*"))) >= 3
    shutil.rmtree(tmp_path / "out.partial")
    convert(open_checkpoint(str(source)), "compressed-tensors", out, shard_bytes=SHARD)


def test_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 1 << 30))
    real = os.pwrite

    def full(*words: object) -> int:
        if next(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(LowbitError, match=r"the disk is full; \d+ finished shards are kept") as caught:
            convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out", shard_bytes=SHARD)
    assert caught.value.code == "E0511"
    done = convert(open_checkpoint(str(GPTQ)), "compressed-tensors", tmp_path / "out", shard_bytes=SHARD)
    assert done.resumed > 0


def test_experts_of_stacks_are_converted_one_by_one(tmp_path: Path) -> None:
    """gpt-oss' MXFP4, gate and up in turn, in a format without stacks: the same logits."""
    header = open_checkpoint(str(FIXTURES / "mxfp4" / "gpt_oss"))
    convert(header, "compressed-tensors", tmp_path / "out")
    result = open_checkpoint(str(tmp_path / "out"))
    assert "model.layers.0.mlp.experts.1.up_proj.weight_packed" in result.tensors
    models = (load_model(one, device="cpu", strict=True) for one in (header, result))
    before, after = (prompt_logits(model, [[3, 5, 7, 9]])[0] for model in models)
    assert torch.equal(before, after)


REQUANTIZED = [
    ("compressed_tensors/w8a8_dynamic", "gptq", "", "rtn bits=8 symmetric=True"),
    ("compressed_tensors/w8a8_dynamic", "awq", "rtn:bits=4,group_size=32", "rtn bits=4 group_size=32"),
    ("fp8/tensor_static", "gptq", "rtn:bits=4,symmetric=true", "rtn bits=4 symmetric=True"),
    ("gptq/w4_asym_actorder", "modelopt", "", "nvfp4"),
    ("gptq/w4_asym_actorder", "torchao", "", "int8wo"),
    ("gptq/w4_asym_actorder", "bitsandbytes", "", "nf4"),
    ("gptq/w4_asym_actorder", "hqq", "", "hqq bits=4 group_size=64"),
    ("gptq/w4_asym_actorder", "compressed-tensors", "", ""),  # holds it as it is
    ("awq/gemm", "fp8", "", "fp8"),
    # Rows of 64 and 96 columns: the groups of 32 that both have.
    ("gptq/w3_asym", "awq", "", "rtn bits=4 group_size=32"),
    ("gptq/w4_ragged", "awq", "", "rtn bits=4 group_size=32"),  # one module's last group is short
    ("modelopt/nvfp4_awq", "compressed-tensors", "", "rtn"),
    ("modelopt/nvfp4_experts", "compressed-tensors", "", "rtn"),  # of which an outer scale is rounded
    ("torchao/int4_plain", "gptq", "", "rtn bits=4 symmetric=False"),  # it has offsets
]


@pytest.mark.parametrize(
    ("name", "form", "method", "key"), REQUANTIZED, ids=lambda text: str(text).replace("/", "-")
)
def test_requantized(name: str, form: str, method: str, key: str, tmp_path: Path) -> None:
    """The error of each module on record is that between source and result, by their own readers."""
    header = open_checkpoint(str(FIXTURES / name))
    if key:
        with pytest.raises(
            LowbitError, match="cannot be written without changing its numbers|--requantize"
        ) as caught:
            convert(header, form, tmp_path / "out")
        assert caught.value.code == "E0450"
    done = convert(header, form, tmp_path / "out", requantize=method)
    assert done.method.startswith(key)
    before, after = SourceModel(header), SourceModel(open_checkpoint(str(tmp_path / "out")), strict=True)
    assert after.form.name == form
    told = certificate_of(tmp_path / "out")
    assert told["exact"] == (not key)
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for one, other in zip(before.modules, after.modules, strict=True):
            read = before.read(one, old)
            a, b = read.weight.dequantize(), after.read(other, new).weight.dequantize()
            if read.input is not None and read.input.multiplier is not None:
                a = a * read.input.multiplier.float()
            entry = told["modules"][one.place.part.name]
            far = (a - b).abs()
            assert entry.get("largest_error", 0.0) == float(far.max()), one.target.name
            if far.max() > 0:
                assert done.errors[one.place.part.name][0] == float(far.max())
                assert 0 < entry["largest_relative_error"] <= 1
    changed = [line for line in summary(done) if "largest error" in line]
    assert len(changed) == len(done.errors) and bool(changed) == bool(key)


def test_outer_scales_that_others_take_for_one_are_told(tmp_path: Path) -> None:
    """vLLM and SGLang read Q, K and V of NVFP4 under the largest of their outer scales."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "compressed_tensors" / "nvfp4", source)
    tensors = load_file(source / "model.safetensors")
    first = "model.layers.0.self_attn"
    for leaf in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{first}.{leaf}.weight_global_scale"] = torch.tensor([256.0])
    for leaf in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{leaf}.weight_global_scale"] = torch.tensor([512.0])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    alike = convert(open_checkpoint(str(source)), "modelopt", tmp_path / "alike").notes
    tensors[f"{first}.k_proj.weight_global_scale"] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    notes = convert(open_checkpoint(str(source)), "modelopt", tmp_path / "apart").notes
    [more] = [note for note in notes if note not in alike]
    assert more.startswith(f"the parts of 1 layers like {first}.qkv_proj have outer scales of their own")
    assert more in certificate_of(tmp_path / "apart")["notes"]


def test_an_outer_scale_is_rounded_and_nothing_else(tmp_path: Path) -> None:
    """ModelOpt's outer scales are any float32, compressed-tensors' are reciprocals."""
    header = open_checkpoint(str(FIXTURES / "modelopt" / "nvfp4_experts"))
    done = convert(header, "compressed-tensors", tmp_path / "out", requantize="")
    assert done.rounded and set(done.rounded) == set(done.errors)
    assert f"({len(done.rounded)} with rounded outer scales)" in summary(done)[0]
    before, after = SourceModel(header), SourceModel(open_checkpoint(str(tmp_path / "out")), strict=True)
    assert [module.scheme for module in after.modules] == [module.scheme for module in before.modules]
    assert all(relative <= 2.0**-22 for _, relative in done.errors.values())
    modules = certificate_of(tmp_path / "out")["modules"]
    assert [name for name, one in modules.items() if "rounded" in one] == done.rounded


@pytest.mark.parametrize(
    ("name", "form", "limit"),
    [
        ("sglang/w8a8_int8", "compressed-tensors", 127.5),
        ("compressed_tensors/w8a8_dynamic", "w8a8_int8", 127.0),
    ],
)
def test_a_rule_of_inputs_that_a_format_does_not_have(
    name: str, form: str, limit: float, tmp_path: Path
) -> None:
    """The weights stay, inputs are rounded by the format's own rule, and that is said."""
    header = open_checkpoint(str(FIXTURES / name))
    with pytest.raises(LowbitError, match=r"inputs (cannot be said to be|are always) int8 1xall dynamic"):
        convert(header, form, tmp_path / "out")
    done = convert(header, form, tmp_path / "out", requantize="")
    told = [note for note in done.notes if "by the rule of" in note]
    assert told == [
        f"inputs are quantized by the rule of {form}: their largest |x| becomes {limit:g}, not "
        f"{254.5 - limit:g}"
    ]
    assert not done.errors and "every number as it was" in summary(done)[0]
    before, after = SourceModel(header), SourceModel(open_checkpoint(str(tmp_path / "out")), strict=True)
    assert after.form.name == form
    with TensorData(before.header) as old, TensorData(after.header) as new:
        for one, other in zip(before.modules, after.modules, strict=True):
            a, b = before.read(one, old).weight, after.read(other, new).weight
            assert torch.equal(a.dequantize(), b.dequantize())
            if one.scheme.activation is not None:
                assert other.scheme.activation == replace(one.scheme.activation, limit=limit)


def test_a_method_whose_rule_of_inputs_a_format_does_not_have(tmp_path: Path) -> None:
    """w8a8_int8 in compressed-tensors: the method's codes and scales."""
    make_float32(tmp_path / "float")
    header = open_checkpoint(str(tmp_path / "float"))
    convert(header, "w8a8_int8", tmp_path / "sglang", requantize="")
    done = convert(header, "compressed-tensors", tmp_path / "out", requantize="w8a8_int8")
    assert any("becomes 127.5, not 127" in note for note in done.notes)
    wanted, found = (
        SourceModel(open_checkpoint(str(tmp_path / name)), strict=True) for name in ("sglang", "out")
    )
    with TensorData(wanted.header) as old, TensorData(found.header) as new:
        for one, other in zip(wanted.modules, found.modules, strict=True):
            a, b = wanted.read(one, old).weight, found.read(other, new).weight
            assert torch.equal(a.codes, b.codes)
    assert any(module.scheme.activation is not None for module in found.modules)


def test_every_rounded_outer_scale_can_be_said() -> None:
    scales = torch.exp2(torch.rand(20_000, generator=torch.Generator().manual_seed(2)) * 40 - 30)
    wanted = 1.0 / (1.0 / scales)
    module = StoredModule("m", "m", (1, 1))
    for scale in wanted.split(1):
        assert torch.equal(1.0 / reciprocal(scale, "compressed-tensors", module), scale)


def test_one_gguf_file(tmp_path: Path) -> None:
    """Its certificate lies beside it, and lowbit check compares the file with it."""
    families = FIXTURES / "gguf_families"
    convert(open_checkpoint(str(families / "llama.gguf")), "dense", tmp_path / "folder")
    out = tmp_path / "made" / "out.gguf"
    done = convert(open_checkpoint(str(tmp_path / "folder")), "gguf", out, requantize="gguf:type=q8_0")
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.gguf", f"out.gguf.{CERTIFICATE}"]
    told = json.loads(out.with_name(f"out.gguf.{CERTIFICATE}").read_text())
    assert told["result"]["files"]["out.gguf"]["bytes"] == done.nbytes == out.stat().st_size
    assert done.errors and all(0 < relative < 2**-6 for _, relative in done.errors.values())
    assert "D006" not in [finding.rule for finding in examine(out, canary=False).report.findings]
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    assert "D006" in [finding.rule for finding in examine(out, canary=False).report.findings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of floats, with a tokenizer."""
    made = tmp_path_factory.mktemp("folder") / "llama"
    convert(open_checkpoint(str(FIXTURES / "gguf_families" / "llama.gguf")), "dense", made)
    return made


def broken_off(
    run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, tensors: int, error: BaseException
) -> None:
    """A run that writes a GGUF file and ends after so many tensors of it, in the middle of the next."""
    real = os.pwrite
    journal = FileJournal.add_tensor

    def pwrite(number: int, data: memoryview, at: int) -> int:
        if done and len(done[-1].lines) == tensors and len(data) > 8:
            real(number, data[: len(data) // 2], at)
            raise error
        return real(number, data, at)

    def add(self: FileJournal, *words: object) -> None:
        journal(self, *words)  # type: ignore[arg-type]
        done.append(self)

    done: list[FileJournal] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(FileJournal, "add_tensor", add)
        with pytest.raises(type(error) if not isinstance(error, OSError) else LowbitError) as caught:
            run()
    if isinstance(error, OSError):
        assert isinstance(caught.value, LowbitError) and caught.value.code == "E0511"
        assert f"{tensors} finished tensors are kept" in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "error"),
    [(1, KeyboardInterrupt()), (7, OSError(28, "No space left on device")), (20, Killed())],
    ids=["Ctrl-C", "full disk", "killed"],
)
def test_a_gguf_file_goes_on(
    tensors: int, error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes and the record of one written in one go; what is finished is neither read nor made again."""

    def run(out: Path) -> Conversion:
        return convert(open_checkpoint(str(folder)), "gguf", out, requantize="gguf:type=q4_0")

    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    run(whole)
    broken_off(lambda: run(out), monkeypatch, tensors, error)
    partial = tmp_path / "out.gguf.partial"
    assert not out.exists() and (partial / JOURNAL).exists()
    assert "D007" in [finding.rule for finding in examine(partial, canary=False).report.findings]
    read: list[str] = []
    real = SourceModel.read

    def counted(self: SourceModel, module: SourceModule, data: TensorData) -> ReadModule:
        if self.header.root == folder:
            read.append(module.target.name)
        return real(self, module, data)

    with monkeypatch.context() as patch:
        patch.setattr(SourceModel, "read", counted)
        done = run(out)
    tensors_of = {t.name: t.tensor_type for t in gguf.GGUFReader(whole).tensors}
    modules = [name for name in list(tensors_of)[tensors:] if "norm" not in name and "rope" not in name]
    assert done.resumed == tensors and len(read) == len(modules)
    assert f"{tensors} tensors were finished by an earlier run" in summary(done)
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    told, wanted = (
        json.loads(path.with_name(f"{path.name}.{CERTIFICATE}").read_text()) for path in (out, whole)
    )
    assert told["modules"] == wanted["modules"] and list(told["modules"]) == list(wanted["modules"])
    assert done.errors == run(tmp_path / "third.gguf").errors and done.errors


def test_another_source_or_command_begins_a_gguf_file_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tmp_path / "model", tmp_path / "out.gguf"
    shutil.copytree(folder, source)

    def run(kind: str) -> Conversion:
        return convert(open_checkpoint(str(source)), "gguf", out, requantize=f"gguf:type={kind}", force=True)

    for kind, other, what in (
        (
            "q8_0",
            "q4_0",
            r"another --requantize \(gguf .*type=q8_0 then, gguf .*type=q4_0 now\), GGUF header \(",
        ),
        ("q4_0", "q4_0", r"another source \("),
    ):
        broken_off(lambda kind=kind: run(kind), monkeypatch, 9, KeyboardInterrupt())  # type: ignore[misc]
        if kind == other:
            os.utime(source / "model.safetensors", ns=(1, 1))
        caplog.clear()
        assert run(other).resumed == 0
        [said] = [record.getMessage() for record in caplog.records if "begun anew" in record.getMessage()]
        assert re.search(what, said), said
    convert(open_checkpoint(str(source)), "gguf", tmp_path / "whole.gguf", requantize="gguf:type=q4_0")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_quantizing_into_a_gguf_file_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--save-quantized with --quantization gguf."""

    def run(out: Path) -> Path:
        opened = Opened.of(open_checkpoint(str(folder)), Asked("gguf:type=q5_0"), False)
        assert opened.recipe is not None
        return Quantizing(opened, opened.recipe, Calibration()).write(out)

    whole = run(tmp_path / "whole")
    broken_off(lambda: run(tmp_path / "out"), monkeypatch, 11, KeyboardInterrupt())
    made: list[str] = []
    real = Quantizing._quantized

    def counted(self: Quantizing, module: _Module, data: TensorData) -> ReadModule:
        made.append(module.target.name)
        return real(self, module, data)

    monkeypatch.setattr(Quantizing, "_quantized", counted)
    assert run(tmp_path / "out").read_bytes() == whole.read_bytes()
    assert 0 < len(made) < len(SourceModel(open_checkpoint(str(whole))).modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_killed_while_it_writes_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    """SIGKILL for the command itself, in the middle of a tensor."""
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    words = ["convert", str(folder), "--format", "gguf", "--out"]
    script = (
        "import os, signal, sys\n"
        "from lowbit.checkpoint.journal import FileJournal\n"
        "from lowbit.cli import main\n"
        "real = FileJournal.add_tensor\n"
        "def add(self, *words):\n"
        "    real(self, *words)\n"
        "    if len(self.lines) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "FileJournal.add_tensor = add\n"
        "main(sys.argv[1:])\n"
    )
    died = subprocess.run([sys.executable, "-c", script, *words, str(out)], check=False)
    assert died.returncode == -signal.SIGKILL and not out.exists()
    done = convert(open_checkpoint(str(folder)), "gguf", out)
    convert(open_checkpoint(str(folder)), "gguf", whole)
    assert done.resumed == 5 and out.read_bytes() == whole.read_bytes()


def test_what_cannot_be_a_certificate(tmp_path: Path) -> None:
    convert(open_checkpoint(str(GPTQ)), "dense", tmp_path / "out")
    for text in ("{}", '{"result": {"files": {"../x": {"sha256": "0"}}}}', '{"result": {"files": {"x": 1}}}'):
        (tmp_path / "out" / CERTIFICATE).write_text(text)
        found = [one for one in examine(tmp_path / "out", canary=False).report.findings if one.rule == "D001"]
        assert CERTIFICATE in found[0].message


def test_quantizing_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--save-quantized of a method without calibration: the bytes of an undisturbed run."""
    convert(open_checkpoint(str(GPTQ)), "dense", tmp_path / "float")

    def write(out: Path, method: str = "rtn") -> None:
        header = open_checkpoint(str(tmp_path / "float"))
        opened = Opened.of(header, Asked(method), False)
        assert opened.recipe is not None
        Quantizing(opened, opened.recipe, Calibration()).write(out, shard_bytes=SHARD)

    write(tmp_path / "whole")
    real = ShardedWriter._settle

    def settle(self: ShardedWriter, one: object) -> None:
        real(self, one)
        if self._told == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "_settle", settle)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out")
    with pytest.raises(LowbitError, match="another --quantization"):
        write(tmp_path / "out", "int8")
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_requantize_refusals(tmp_path: Path) -> None:
    header = open_checkpoint(str(GPTQ))
    for form, method, code in (
        ("dense", "", "E0405"),
        ("gptq", "gptq", "E0405"),
        ("gptq", "nf4", "E0450"),
        ("gptq", "int99", "E0402"),
    ):
        with pytest.raises(LowbitError) as caught:
            source = open_checkpoint(str(FIXTURES / "fp8" / "tensor_static")) if form == "gptq" else header
            convert(source, form, tmp_path / "out", requantize=method)
        assert caught.value.code == code, (form, method, caught.value.message)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(FIXTURES / "compressed_tensors" / "w8a8_dynamic")
    words = ["convert", source, "--format", "gptq", "--out", str(tmp_path / "out")]
    assert main(words) == 4
    assert "add --requantize" in capsys.readouterr().err
    assert main([*words, "--requantize"]) == 0
    told = capsys.readouterr().out
    assert "modules requantized by rtn bits=8" in told and "largest error" in told
    assert "inputs are no longer quantized" in told
