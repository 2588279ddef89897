"""Damaged and hostile checkpoints: each is refused in one line, or reads the same as before.

Seeded. The verdict of a mutation is "a LowbitError of the checkpoint kind", or, for flips that hit a free
number or an unused name, "everything that was read is equal". Never another exception, never memory out of
proportion to the file.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.tiny import join_safetensors, split_safetensors, write_folder, write_gguf_file
from lowbit.checkpoint import CheckpointHeader, open_checkpoint
from lowbit.errors import EXIT_CHECKPOINT, EXIT_UNSUPPORTED, LowbitError
from lowbit.loading import load_model, plan_model

SIZES = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]
ALLOWANCE = 64 << 20


def outcome(path: Path) -> CheckpointHeader | LowbitError:
    """What opening, planning and loading come to."""
    try:
        header = open_checkpoint(str(path))
        plan_model(header, device="cpu")
        load_model(header, device="cpu")
    except LowbitError as error:
        assert error.exit_code in (EXIT_CHECKPOINT, EXIT_UNSUPPORTED), error
        assert "\n" not in error.message and len(error.message) < 1200
        return error
    return header


def must_refuse(path: Path) -> None:
    found = outcome(path)
    assert isinstance(found, LowbitError), "a damaged checkpoint was loaded"


def refuse_or_equal(path: Path, before: CheckpointHeader) -> None:
    """A flip may hit what is free: a number of the config, a metadata text; places and shapes are not."""
    found = outcome(path)
    if isinstance(found, LowbitError):
        return
    kept = {name: (e.dtype, e.shape, e.start, e.nbytes) for name, e in found.tensors.items()}
    assert kept == {name: (e.dtype, e.shape, e.start, e.nbytes) for name, e in before.tensors.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sharded", shards=3)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf_file(tmp_path / "model.gguf")


def test_the_seeds_load(folder: Path, sharded: Path, gguf: Path) -> None:
    for path in (folder, sharded, gguf):
        assert isinstance(outcome(path), CheckpointHeader)


# ---- lengths and counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*SIZES, "size - 1", "size + 1"])
def test_m01_safetensors_header_length(folder: Path, value: int | str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    number = length + {"size - 1": -1, "size + 1": 1}[value] if isinstance(value, str) else value
    file.write_bytes(struct.pack("<Q", number) + data[8:])
    must_refuse(folder)


@pytest.mark.parametrize("value", [*SIZES, -1, 1.5, True, "8", None])
@pytest.mark.parametrize("field", ["shape 0", "shape 1", "begin", "end"])
def test_m01_safetensors_numbers(folder: Path, field: str, value: object) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    entry = header["model.layers.0.mlp.up_proj.weight"]
    places = {"shape 0": ("shape", 0), "shape 1": ("shape", 1), "begin": ("data_offsets", 0)}
    key, at = places.get(field, ("data_offsets", 1))
    entry[key][at] = value
    file.write_bytes(join_safetensors(header, payload))
    must_refuse(folder)


def gguf_number_places(data: bytes) -> list[int]:
    """Where 64-bit counts stand: tensors, metadata entries, the first key's length, a tensor's first size."""
    first_tensor = data.index(b"token_embd.weight")
    return [8, 16, 24, data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8,
            first_tensor - 8, first_tensor + 17 + 4, first_tensor + 17 + 4 + 16 + 4]  # fmt: skip


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize("place", range(7))
def test_m01_gguf_counts(gguf: Path, place: int, value: int) -> None:
    data = bytearray(gguf.read_bytes())
    at = gguf_number_places(bytes(data))[place]
    original = struct.unpack_from("<Q", data, at)[0]
    if value == original:
        value += 1
    struct.pack_into("<Q", data, at, value)
    gguf.write_bytes(data)
    tracemalloc.start()
    must_refuse(gguf)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ALLOWANCE + 2 * len(data)


# ---- truncation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 0.3, 0.6, 0.99, -1, "longer"])
def test_m02_truncated_safetensors(folder: Path, cut: int | float | str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if cut == "longer":
        file.write_bytes(data + b"\0")
    else:
        assert not isinstance(cut, str)
        file.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    must_refuse(folder)


@pytest.mark.parametrize("seed", range(24))
def test_m02_truncated_gguf(gguf: Path, seed: int) -> None:
    data = gguf.read_bytes()
    draw = random.Random(seed)
    structural = [0, 1, 3, 4, 7, 8, 15, 16, 23, 24, 25, data.index(b"token_embd") + 3]
    cut = structural[seed] if seed < len(structural) else draw.randrange(len(data) - 32)
    gguf.write_bytes(data[:cut])
    must_refuse(gguf)


def test_m02_gguf_with_a_tail(gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes() + b"\0" * 4096)
    must_refuse(gguf)


# ---- flips in the header -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_m03_flips_in_safetensors(folder: Path, seed: int) -> None:
    before = open_checkpoint(str(folder))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 16)):
        data[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    refuse_or_equal(folder, before)


@pytest.mark.parametrize("seed", range(60))
def test_m03_flips_in_gguf(gguf: Path, seed: int) -> None:
    before = open_checkpoint(str(gguf))
    data = bytearray(gguf.read_bytes())
    end = min(entry.start for entry in before.tensors.values()) - 32
    draw = random.Random(100 + seed)
    for _ in range(draw.randint(1, 16)):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    gguf.write_bytes(data)
    refuse_or_equal(gguf, before)


# ---- JSON ----------------------------------------------------------------------------------------------

BAD_JSON: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "array": lambda text: b"[" + text.encode() + b"]",
    "number": lambda text: b"12",
    "null": lambda text: b"null",
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "bad utf-8": lambda text: text[:-1].encode() + b', "x": "\xff\xfe"}',
    "duplicate key": lambda text: (text[:-1] + "," + text[1:]).encode(),
    "NaN": lambda text: (text[:-1] + ', "x": NaN}').encode(),
    "1e999": lambda text: (text[:-1] + ', "x": {"dtype": "F32", "shape": [1e999]}}').encode(),
    "deep": lambda text: (text[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}").encode(),
    "trailing comma": lambda text: (text[:-1] + ",}").encode(),
    "comment": lambda text: ("// no\n" + text).encode(),
    "cut": lambda text: text[: len(text) // 2].encode(),
    "long number": lambda text: (text[:-1] + ', "x": ' + "9" * 10_000 + "}").encode(),
}


@pytest.mark.parametrize("kind", BAD_JSON)
@pytest.mark.parametrize("document", ["header", "config.json", "model.safetensors.index.json"])
def test_m04_json(folder: Path, sharded: Path, document: str, kind: str) -> None:
    if document == "header":
        file = folder / "model.safetensors"
        header, payload = split_safetensors(file.read_bytes())
        file.write_bytes(join_safetensors(None, payload, BAD_JSON[kind](json.dumps(header))))
        must_refuse(folder)
        return
    file = sharded / document
    before = open_checkpoint(str(sharded))
    file.write_bytes(BAD_JSON[kind](file.read_text()))
    if kind == "1e999":  # an unknown key of infinite value: nobody reads it
        refuse_or_equal(sharded, before)
    else:
        must_refuse(sharded)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[31mred", "", "n" * 2000])
def test_m04_names(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    header[name] = header.pop("model.norm.weight")
    file.write_bytes(join_safetensors(header, payload))
    found = outcome(folder)
    assert isinstance(found, LowbitError)
    assert found.message.isprintable()


# ---- offsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["overlap", "hole", "reversed", "past the end", "wrap", "swap sizes"])
def test_m05_safetensors_offsets(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    first, second = header[names[0]], header[names[1]]
    begin, end = second["data_offsets"]
    changed = {
        "overlap": [begin - 4, end - 4],
        "hole": [begin + 4, end + 4],
        "reversed": [end, begin],
        "past the end": [begin + len(payload), end + len(payload)],
        "wrap": [begin + (1 << 64), end + (1 << 64)],
        "swap sizes": first["data_offsets"],
    }
    second["data_offsets"] = changed[kind]
    file.write_bytes(join_safetensors(header, payload))
    must_refuse(folder)


@pytest.mark.parametrize("offset", [1, 31, 32, (1 << 64) - 32, 1 << 40])
def test_m05_gguf_offsets(gguf: Path, offset: int) -> None:
    data = bytearray(gguf.read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 16 + 4
    struct.pack_into("<Q", data, place, offset)
    gguf.write_bytes(data)
    must_refuse(gguf)


# ---- dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "F16", "I32", "U8", "F8_E4M3", "BOOL", "Q4_0", "f32", "", None, 4])
def test_m06_safetensors_dtype(folder: Path, dtype: object) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    header["lm_head.weight"]["dtype"] = dtype
    file.write_bytes(join_safetensors(header, payload))
    must_refuse(folder)


@pytest.mark.parametrize("kind", [*range(1, 43), 97, 255, 1 << 31])
def test_m06_gguf_type(gguf: Path, kind: int) -> None:
    """Another type of the same size could only be told by a checksum; Q8_0's rows fit no other."""
    data = bytearray(gguf.read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 16
    if kind == struct.unpack_from("<I", data, place)[0]:
        return
    struct.pack_into("<I", data, place, kind)
    gguf.write_bytes(data)
    found = outcome(gguf)
    # A smaller type leaves a gap in the file that padding could explain; its bytes decode to something.
    small = {2, 3, 6, 7, 20, 39, 40, 24}
    assert isinstance(found, LowbitError) or kind in small


# ---- sets of files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(14))
def test_m08_missing_extra_and_renamed_tensors(folder: Path, seed: int) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    names = sorted(header.keys() - {"__metadata__"})
    name = names[seed % len(names)]
    if seed % 2:
        header[name.replace("weight", "wait")] = header.pop(name)
    else:
        header["model.extra.weight"] = header.pop(name)
    file.write_bytes(join_safetensors(header, payload))
    must_refuse(folder)


@pytest.mark.parametrize("what", ["missing", "swapped", "duplicated", "empty", "lfs", "html", "gzip", "zip"])
def test_m08_shards(sharded: Path, what: str) -> None:
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    data = first.read_bytes()
    changed = {
        "missing": None,
        "swapped": second.read_bytes(),
        "duplicated": second.read_bytes(),
        "empty": b"",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "html": b"<!DOCTYPE html><html><body>Access to model is restricted</body></html>",
        "gzip": b"\x1f\x8b" + data,
        "zip": b"PK\x03\x04" + data,
    }[what]
    if changed is None:
        first.unlink()
    else:
        first.write_bytes(changed)
    if what == "swapped":
        second.write_bytes(data)
    must_refuse(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", ".", "..", "", "x\\y", "a\0b"]
)
def test_m08_index_leads_outside(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = name
    index.write_text(json.dumps(values))
    must_refuse(sharded)


@pytest.mark.parametrize("what", ["fifo", "directory", "device", "dangling link"])
def test_m08_what_is_no_file(folder: Path, what: str) -> None:
    file = folder / "model.safetensors"
    file.unlink()
    match what:
        case "fifo":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "device":
            file.symlink_to("/dev/zero")
        case _:
            file.symlink_to(folder / "gone")
    must_refuse(folder)


# ---- GGUF only -----------------------------------------------------------------------------------------


def with_metadata(gguf: Path, **changes: object) -> Path:
    from checkpoint.tiny import METADATA, gguf_tensors
    from gguf_writing import write_gguf

    metadata = {**METADATA, **{key.replace("__", "."): value for key, value in changes.items()}}
    write_gguf(gguf, metadata, gguf_tensors())
    return gguf


@pytest.mark.parametrize("version", [0, 1, 4, 99, 3 << 24])
def test_m10_version(gguf: Path, version: int) -> None:
    data = bytearray(gguf.read_bytes())
    struct.pack_into("<I", data, 4, version)
    gguf.write_bytes(data)
    found = outcome(gguf)
    assert isinstance(found, LowbitError) and found.code == "E0222"


@pytest.mark.parametrize("alignment", [0, 1, 3, 13, 1 << 31, "32", True])
def test_m10_alignment(gguf: Path, alignment: object) -> None:
    must_refuse(with_metadata(gguf, general__alignment=alignment))  # the file was padded for 32


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__block_count": 0},
        {"llama__block_count": 2},
        {"llama__attention__head_count": 0},
        {"llama__attention__head_count": 5},
        {"llama__attention__head_count_kv": 3},
        {"llama__embedding_length": 0},
        {"llama__embedding_length": 32},
        {"llama__feed_forward_length": 97},
        {"llama__attention__layer_norm_rms_epsilon": float("nan")},
        {"llama__attention__layer_norm_rms_epsilon": 0.0},
        {"llama__rope__freq_base": float("inf")},
        {"llama__rope__dimension_count": 33},
        {"llama__rope__dimension_count": 64},
        {"llama__context_length": 0},
        {"llama__rope__scaling__type": "spiral"},
        {"general__architecture": "mamba"},
        {"general__architecture": 7},
        {"general__type": "adapter"},
        {"general__type": "mmproj"},
    ],
    ids=str,
)
def test_m10_metadata_values(gguf: Path, changes: dict[str, object]) -> None:
    must_refuse(with_metadata(gguf, **changes))


@pytest.mark.parametrize("kind", [13, 14, 255, 1 << 31])
def test_m10_unknown_value_type(gguf: Path, kind: int) -> None:
    data = bytearray(gguf.read_bytes())
    place = data.index(b"llama.block_count") + len("llama.block_count")
    struct.pack_into("<I", data, place, kind)
    gguf.write_bytes(data)
    must_refuse(gguf)


def test_m10_nested_arrays_end(gguf: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000
    gguf.write_bytes(header + nested + bytes(64))
    must_refuse(gguf)


def test_m10_duplicates(gguf: Path) -> None:
    data = gguf.read_bytes()
    gguf.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight"))
    must_refuse(gguf)
    gguf.write_bytes(data.replace(b"llama.embedding_length", b"llama.attention.head_ct", 1))
    must_refuse(gguf)


def test_m10_bools_are_bools(gguf: Path) -> None:
    data = bytearray(gguf.read_bytes())
    key = b"tokenizer.ggml.add_bos_token"
    data[data.index(key) + len(key) + 4] = 7
    gguf.write_bytes(data)
    must_refuse(gguf)


# ---- shapes --------------------------------------------------------------------------------------------

SHAPES = {
    "transposed": lambda shape: shape[::-1],
    "one row more": lambda shape: [shape[0] + 1, *shape[1:]],
    "one row less": lambda shape: [shape[0] - 1, *shape[1:]],
    "one column more": lambda shape: [*shape[:-1], shape[-1] + 1],
    "empty": lambda shape: [0, *shape[1:]],
    "extra dimension": lambda shape: [1, *shape],
    "flat": lambda shape: [shape[0] * shape[1]],
    "overflow": lambda shape: [1 << 40, 1 << 40],
    "nine dimensions": lambda shape: [1] * 7 + list(shape),
    "halved and doubled": lambda shape: [shape[0] // 2, shape[1] * 2],
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ["mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("fits", [True, False], ids=["bytes fit", "bytes as they were"])
def test_m07_safetensors_shapes(folder: Path, name: str, kind: str, fits: bool) -> None:
    """Also with as many bytes as the new shape needs: then only the config can tell."""
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    entry = header[f"model.layers.0.{name}.weight"]
    entry["shape"] = SHAPES[kind](list(entry["shape"]))
    needed = 4
    for size in entry["shape"]:
        needed *= size
    begin, end = entry["data_offsets"]
    if fits and needed != end - begin and needed < 1 << 20:
        moved = needed - (end - begin)
        payload = payload[:begin] + bytes(needed) + payload[end:]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [at + moved for at in other["data_offsets"]]
        entry["data_offsets"] = [begin, begin + needed]
    file.write_bytes(join_safetensors(header, payload))
    must_refuse(folder)


@pytest.mark.parametrize("sizes", [(96, 64), (64, 97), (64, 95), (32, 192), (1 << 62, 4), (64, 0), (128, 96)])
def test_m07_gguf_shapes(gguf: Path, sizes: tuple[int, int]) -> None:
    data = bytearray(gguf.read_bytes())
    name = b"blk.0.ffn_up.weight"
    struct.pack_into("<QQ", data, data.index(name) + len(name) + 4, *sizes)
    gguf.write_bytes(data)
    must_refuse(gguf)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", n) for n in (32, 63, 65, 128)),
        *(("intermediate_size", n) for n in (95, 97, 64)),
        *(("vocab_size", n) for n in (39, 41, 64)),
        *(("num_attention_heads", n) for n in (1, 4, 3)),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
        ("num_hidden_layers", 2),
    ],
)
def test_m07_config_disagrees(folder: Path, key: str, value: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    if key == "num_attention_heads":
        config["num_key_value_heads"] = value
    (folder / "config.json").write_text(json.dumps(config))
    if key == "num_attention_heads" and value in (1, 4):
        return  # 1 x 64 and 4 x 16 give matrices of the same shape: only the numbers' meaning differs
    must_refuse(folder)
