"""Shards written as they come, against the safetensors library; folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lowbit.checkpoint.folder import read_folder_header
from lowbit.checkpoint.output_folder import MARK, check_room, explained, output_file, output_folder
from lowbit.checkpoint.safetensors_writer import ShardedWriter, write_file
from lowbit.errors import LowbitError

NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64, "I32": np.int32}


def random_tensors(count: int) -> dict[str, tuple[str, np.ndarray]]:
    """Every dtype and odd sizes: most of them misalign whatever comes next."""
    random = np.random.default_rng(3)
    found = {}
    for number in range(count):
        dtype = list(NUMPY)[number % len(NUMPY)]
        shape = tuple(int(size) for size in random.integers(1, 9, int(random.integers(0, 4))))
        values = random.integers(0, 200, shape).astype(NUMPY[dtype])
        found[f"model.{number}.näme"] = (dtype, np.asarray(values))
    return found


def finish(folder: Path, writer: ShardedWriter) -> None:
    (folder / "config.json").write_text("{}")
    writer.finish()


def loaded(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("shard_bytes", [1 << 30, 700])
def test_the_library_reads_them(tmp_path: Path, shard_bytes: int) -> None:
    tensors = random_tensors(60)
    writer = ShardedWriter(tmp_path, shard_bytes)
    for name, (dtype, values) in tensors.items():
        writer.add(name, dtype, values.shape, values.tobytes())
    finish(tmp_path, writer)
    found = loaded(tmp_path)
    assert found.keys() == tensors.keys()
    for name, (_, values) in tensors.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name
    header = read_folder_header(tmp_path)  # lowbit's own strict reader, index included
    for name, entry in header.tensors.items():
        assert entry.start % NUMPY[entry.dtype]().itemsize == 0, f"{name} cannot be viewed where it lies"
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (shard_bytes > 700)
    if shard_bytes == 700:
        assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(values.nbytes for _, values in tensors.values())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_shard_ends_when_its_header_is_full(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, room=1 << 12)
    for number in range(100):
        writer.add(f"{'x' * 90}{number}", "I64", (1,), np.int64(number).tobytes())
    finish(tmp_path, writer)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert {int(name[90:]): int(value[0]) for name, value in loaded(tmp_path).items()} == {
        n: n for n in range(100)
    }


@pytest.mark.parametrize("shard_bytes", [1 << 30, 64])
@pytest.mark.parametrize("shape", [(2, 4), (3, 1)])
def test_stacks_are_filled_in_any_order(tmp_path: Path, shard_bytes: int, shape: tuple[int, int]) -> None:
    """Slices of two stacks in turn, the last first, with others between; also over a shard's border."""
    random = np.random.default_rng(5)
    stacks = {name: random.integers(0, 255, (5, *shape)).astype(np.uint8) for name in ("a", "b")}
    writer = ShardedWriter(tmp_path, shard_bytes)
    for number in (4, 0, 2, 3, 1):
        for name, stack in stacks.items():
            writer.add_slice(name, "U8", shape, number, 5, stack[number].tobytes())
        writer.add(f"between{number}", "F32", (9,), np.full(9, number, np.float32).tobytes())
    finish(tmp_path, writer)
    found = loaded(tmp_path)
    for name, stack in stacks.items():
        assert np.array_equal(found[name], stack)
    assert all((found[f"between{number}"] == number).all() for number in range(5))


def test_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with output_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists() and json.loads((folder / MARK).read_text()) == {"pid": os.getpid()}
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), output_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise ValueError("broken")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_room(tmp_path: Path) -> None:
    """As mkdir leaves one; what appears in it meanwhile stays."""
    out = tmp_path / "out"
    out.mkdir()
    with output_folder(out) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(LowbitError, match="appeared meanwhile"), output_folder(other) as folder:
        (other / "mine").write_text("x")
    assert [path.name for path in other.iterdir()] == ["mine"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(LowbitError, match="E0302|--force"), output_folder(out):
        pass
    with (
        pytest.raises(LowbitError, match="is what is being read"),
        output_folder(out, force=True, source=out),
    ):
        pass
    with pytest.raises(ValueError, match="late"), output_folder(out, force=True) as folder:
        (folder / "config.json").write_text("new")
        raise ValueError("late")
    assert (out / "config.json").read_text() == "old"
    with output_folder(out, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.jpg").write_text("mine")
    with pytest.raises(LowbitError, match="is no checkpoint"), output_folder(other, force=True):
        pass


def test_leftovers_of_a_broken_run_are_cleared_and_others_are_not(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / MARK).write_text('{"pid": 1}')
    (partial / "model.safetensors.tmp").write_text("half")
    with output_folder(tmp_path / "out") as folder:
        assert [path.name for path in folder.iterdir()] == [MARK]
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")
    os.rename(tmp_path / "out", tmp_path / "first")
    with pytest.raises(LowbitError, match="not from lowbit"), output_folder(tmp_path / "out"):
        pass
    assert (partial / "diary.txt").read_text() == "mine"


def test_second_writer_is_told_who_is_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out), pytest.raises(LowbitError) as caught, output_folder(out):
        pass
    assert caught.value.code == "E0303" and f"process {os.getpid()}" in caught.value.message
    assert out.exists()


def die_at_call(out: Path, count: int) -> int:
    """Write a folder in a child that dies at the ``count``-th call of the system; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        calls = iter(range(1, 1 << 30))

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*words: object, **more: object) -> object:
                if next(calls) == count:
                    os._exit(9)
                return real(*words, **more)

            return call

        for name in ("rename", "fsync", "pwrite", "ftruncate", "mkdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        with output_folder(out) as folder:
            writer = ShardedWriter(folder, 64)
            for number in range(6):
                writer.add(f"t{number}", "U8", (40,), bytes([number]) * 40)
            writer.finish()
            write_file(folder / "config.json", b"{}")
        status = 0
    finally:
        os._exit(status)


def test_killed_anywhere_the_folder_is_absent_or_whole(tmp_path: Path) -> None:
    """Death at every write, sync and rename; and the next run succeeds over what is left."""
    count = 0
    while True:
        count += 1
        out = tmp_path / f"out{count}"
        status = die_at_call(out, count)
        if status == 0:
            break
        assert status == 9
        if not out.exists():
            assert die_at_call(out, 0) == 0
        assert len(read_folder_header(out).tensors) == 6
    assert count > 30


def test_full_disk_and_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LowbitError) as caught:
        check_room(tmp_path / "out", 1 << 60)
    assert caught.value.code == "E0510" and "1 152 921 504 606 846 976" in caught.value.message

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LowbitError, match="the disk is full"), output_folder(tmp_path / "out") as folder:
        writer = ShardedWriter(folder)
        writer.add("x", "U8", (8,), bytes(8))
    assert not list(tmp_path.iterdir())
    with pytest.raises(LowbitError, match="cannot be written: Permission denied"), explained(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "x")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LowbitError, match="E0300|cannot be written"),
        output_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_one_file_too(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with output_file(out) as path:
        path.write_bytes(b"GGUF")
        assert not out.exists()
    assert out.read_bytes() == b"GGUF" and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(LowbitError, match="E0302|there already"), output_file(out):
        pass
    with pytest.raises(ValueError, match="x"), output_file(out, force=True) as path:
        path.write_bytes(b"half")
        raise ValueError("x")
    assert out.read_bytes() == b"GGUF" and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
