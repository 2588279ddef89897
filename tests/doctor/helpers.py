"""Clean tiny checkpoints, for one thing to be spoilt in each test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import tiny
from gguf_writing import write_gguf
from lowbit.doctor import Examination, examine
from lowbit.numerics.bit_packing import pack_words

CONFIG = {**tiny.CONFIG, "dtype": "float32"}
WORDS = ["[UNK]", "water", "boils", "at", "one", "hundred", "degrees", "the", "level", "of", "sea", "higher"]
WORDS += ["you", "climb", "lower"]
QPROJ = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def add_tokenizer(folder: Path, size: int = tiny.VOCABULARY) -> None:
    """A tokenizer of ``size`` words."""
    words = [*WORDS, *(f"w{n}" for n in range(size))][:size]
    vocabulary = {word: n for n, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def dense(folder: Path, **config: object) -> Path:
    """A sound unquantized checkpoint with a tokenizer; ``config`` None removes a key."""
    tiny.write_folder(folder)
    set_config(folder, **{"dtype": "float32", **config})
    add_tokenizer(folder)
    return folder


def sharded(folder: Path, shards: int = 3) -> Path:
    """The same in several files with an index."""
    tiny.write_folder(folder, shards)
    set_config(folder, dtype="float32")
    add_tokenizer(folder)
    return folder


def gguf(path: Path, spoil: dict[str, bytes] | None = None) -> Path:
    """A sound GGUF file; ``spoil``: other bytes at the start of a tensor."""
    tensors = tiny.gguf_tensors()
    for n, tensor in enumerate(tensors):
        begin = (spoil or {}).get(tensor.name, b"")
        tensors[n] = replace(tensor, data=begin + tensor.data[len(begin) :])
    words = ["t", "0", "t0", *(f"w{n}" for n in range(tiny.VOCABULARY - 3))]
    told = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["t 0"]}
    write_gguf(path, {**tiny.METADATA, **told}, tensors)
    return path


def set_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json, or remove those that are None."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def edit(folder: Path, change: Callable[[Tensors], object], file: str = "model.safetensors") -> None:
    """Change the tensors of a file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    """A change for ``edit``: every name that begins with ``old``."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def packed(
    out: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    form: str = "v1",
    act_order: bool = False,
    seed: int = 0,
) -> Tensors:
    """The tensors of one GPTQ module by suffix."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (columns, out), dtype=np.uint8))
    zeros = np.full((groups, out), 1 << bits - 1) if sym else rng.integers(1, 1 << bits, (groups, out))
    stored = torch.from_numpy((zeros - (form == "v1")).astype(np.uint8))
    order = np.arange(columns) // group
    return {
        "qweight": pack_words(codes, bits, dim=0),
        "qzeros": pack_words(stored, bits, dim=1),
        "scales": torch.from_numpy(rng.uniform(0.001, 0.01, (groups, out)).astype(np.float16)),
        "g_idx": torch.from_numpy((rng.permutation(order) if act_order else order).astype(np.int32)),
    }


def gptq(folder: Path, quantization: dict[str, object] | None = None, **how: object) -> Path:
    """A sound GPTQ checkpoint: every linear but the head is packed as ``packed`` is told."""
    sym, act_order = how.get("sym", True), how.get("act_order", False)
    config = {
        "quant_method": "gptq",
        "bits": how.get("bits", 4),
        "group_size": 32,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if how.get("form", "v1") == "v1" else "gptq_v2",
        **(quantization or {}),
    }
    dense(folder, quantization_config=config)

    def change(tensors: Tensors) -> None:
        linears = [name for name in tensors if name.endswith("_proj.weight")]
        for number, name in enumerate(linears):
            out, columns = tensors.pop(name).shape
            stem = name.removesuffix(".weight")
            for suffix, tensor in packed(out, columns, seed=number, **how).items():  # type: ignore[arg-type]
                tensors[f"{stem}.{suffix}"] = tensor

    edit(folder, change)
    return folder


def checked(path: Path, **how: bool) -> Examination:
    """Everything but the canary."""
    return examine(path, **({"canary": False} | how))


def rules(path: Path) -> list[str]:
    """The rules that found something, in order, each as often as it did."""
    return sorted(finding.rule for finding in checked(path).report.findings)


def only(path: Path, rule: str) -> str:
    """The message of the one finding, which must be by ``rule``."""
    findings = checked(path).report.findings
    assert [finding.rule for finding in findings] == [rule], findings
    return findings[0].message


def fixed(path: Path, out: Path) -> Path:
    """The corrected copy; it must be clean, and the model itself untouched."""
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    found = checked(path)
    assert found.can_fix and found.header is not None, found.report.findings
    found.correction.write(found.header, out)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
    assert rules(out) == [], checked(out).report.findings
    return out


def quantization_of(folder: Path) -> dict[str, object]:
    """config.json's quantization_config."""
    found: dict[str, object] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found
