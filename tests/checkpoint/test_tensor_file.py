"""One file of tensors: killed anywhere, on a full disk, over what is left of it, it gets the same bytes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.checkpoint.journal import JOURNAL, FileJournal
from lowbit.checkpoint.output_folder import MARK, output_file
from lowbit.checkpoint.tensor_file import TensorFile, places_after
from lowbit.errors import LowbitError

HEAD = b"HEAD of this file" * 3
# None ends where an alignment of 32 does, and one is empty.
TENSORS = {f"t{number}": bytes([number + 1]) * size for number, size in enumerate((5, 33, 0, 64, 100, 7))}
WHOLE = HEAD.ljust(64, b"\0") + b"".join(
    data.ljust(-(-len(data) // 32) * 32, b"\0") for data in TENSORS.values()
)


def write(out: Path, key: str = "a", made: list[str] | None = None) -> FileJournal:
    """Write the file; ``made`` gets the names of the tensors that were written in this run."""
    places = places_after(len(HEAD), [(name, len(data)) for name, data in TENSORS.items()], 32)
    journal = FileJournal({"source": key}, name=out.name, places=places)
    with output_file(out, force=True, journal=journal) as path:
        file = TensorFile(path, HEAD, journal, 32)
        try:
            while file.left:
                name = file.left[0].name
                file.add(TENSORS[name], {name: {"told": name}})
                if made is not None:
                    made.append(name)
        finally:
            file.close()
        assert list(journal.parts) == list(TENSORS)
        assert path.read_bytes() == WHOLE
    return journal


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def dying(count: int) -> None:
    """SIGKILL at the ``count``-th call that changes a file."""
    calls = iter(range(1, 1 << 30))

    def wrapped(real: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **more: object) -> object:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)

        return call

    for name in ("rename", "replace", "fsync", "pwrite", "ftruncate", "mkdir", "unlink"):
        setattr(os, name, wrapped(getattr(os, name)))


def test_killed_anywhere(tmp_path: Path) -> None:
    """kill -9 at every call: no file, or the whole one; the next run gives the same bytes and goes on."""
    count, resumed = 0, set()
    while True:
        count += 1
        out = tmp_path / f"out{count}.gguf"

        def killed(count: int = count, out: Path = out) -> None:
            dying(count)
            write(out)

        status = in_child(killed)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        if out.exists():
            assert out.read_bytes() == WHOLE
        else:
            made: list[str] = []
            write(out, made=made)
            resumed.add(len(TENSORS) - len(made))
        assert out.read_bytes() == WHOLE
        write(out)  # with --force, over what a run that died at the very end left beside it
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(f"{out.name}.")] == []
    assert count > 20 and resumed == set(range(len(TENSORS) + 1))


def broken_off(out: Path, tensors: int = 4) -> Path:
    """A run that is interrupted after so many tensors; its folder."""
    real = FileJournal.add_tensor

    def add(self: FileJournal, *words: object) -> None:
        real(self, *words)  # type: ignore[arg-type]
        if len(self.lines) == tensors:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileJournal, "add_tensor", add)
        with pytest.raises(KeyboardInterrupt):
            write(out)
    partial = out.with_name(f"{out.name}.partial")
    assert (partial / out.name).is_file() and not out.exists()
    return partial


@pytest.mark.parametrize("byte", [0, 64, 100, 131, 160, 192, 223])
def test_garbled_file(byte: int, tmp_path: Path) -> None:
    """What lies before the first changed tensor is kept; the head is written anew, whatever it was."""
    out = tmp_path / "out.gguf"
    partial = broken_off(out)
    data = bytearray((partial / out.name).read_bytes())
    data[byte] ^= 255
    (partial / out.name).write_bytes(data)
    made: list[str] = []
    write(out, made=made)
    first = {0: 4, 64: 0, 100: 1, 131: 4, 160: 3, 192: 3, 223: 3}[byte]  # 131: between two tensors
    assert made == list(TENSORS)[first:] and out.read_bytes() == WHOLE


@pytest.mark.parametrize("size", [0, 10, 70, 200])
def test_shortened_file(size: int, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    partial = broken_off(out)
    os.truncate(partial / out.name, size)
    made: list[str] = []
    write(out, made=made)
    assert made == list(TENSORS)[{0: 0, 10: 0, 70: 1, 200: 3}[size] :]
    assert out.read_bytes() == WHOLE


def test_truncated_journal(tmp_path: Path) -> None:
    """Cut off at any byte, or filled up with zeros as a crash may leave it."""
    kept = set()
    text = (broken_off(tmp_path / "out.gguf") / JOURNAL).read_bytes()
    for cut in range(0, len(text) + 1, 41):
        for filled in (b"", b"\0" * 40, b"\xff\xfe"):
            out = tmp_path / f"out{cut}.gguf"
            partial = broken_off(out)
            (partial / JOURNAL).write_bytes(text[:cut] + filled)
            made: list[str] = []
            write(out, made=made)
            kept.add(len(TENSORS) - len(made))
            assert out.read_bytes() == WHOLE
            out.unlink()
    assert kept >= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", 0), ("bytes", 4), ("tensor", "t9"), ("sha256", "0" * 64), ("parts", []), ("offset", "x")],
)
def test_lies_in_the_journal(key: str, value: object, tmp_path: Path) -> None:
    """A line that is not of the tensor that belongs there ends what is taken over."""
    out = tmp_path / "out.gguf"
    journal = broken_off(out) / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[2][key] = value
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made: list[str] = []
    write(out, made=made)
    assert made == list(TENSORS)[1:] and out.read_bytes() == WHOLE


def test_another_key_begins_anew_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    broken_off(out)
    made: list[str] = []
    journal = write(out, "b", made)
    assert made == list(TENSORS) and out.read_bytes() == WHOLE
    assert "was unfinished and of a run with another source (a then, b now); begun anew" in journal.discarded
    assert not write(tmp_path / "other.gguf").discarded


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full after any number of bytes, in the middle of a tensor too: what is finished is kept."""
    real = os.pwrite
    kept = set()
    for room in range(1, sum(map(len, TENSORS.values())) + 64, 6):
        out, free = tmp_path / f"out{room}.gguf", room

        def full(number: int, data: memoryview, at: int) -> int:
            nonlocal free
            if free <= 0:
                raise OSError(28, "No space left on device")
            data = data[:free]
            free -= len(data)
            return real(number, data, at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(LowbitError) as caught:
                write(out)
        partial = out.with_name(f"{out.name}.partial")
        assert caught.value.code == ("E0511" if partial.exists() else "E0510")
        if partial.exists():
            assert "finished tensors are kept" in caught.value.message and (partial / MARK).exists()
        made: list[str] = []
        write(out, made=made)
        kept.add(len(TENSORS) - len(made))
        assert out.read_bytes() == WHOLE
    assert kept == {0, 1, 3, 4, 5}  # the third tensor is empty and takes no room


def test_what_cannot_succeed_is_not_kept(tmp_path: Path) -> None:
    places = places_after(len(HEAD), [("t0", 5)], 32)
    journal = FileJournal({}, name="out.gguf", places=places)
    with (
        pytest.raises(LowbitError, match="wrong"),
        output_file(tmp_path / "out.gguf", journal=journal) as path,
    ):
        file = TensorFile(path, HEAD, journal, 32)
        file.add(b"12345", {})
        file.close()
        raise LowbitError("E0707", "wrong")
    assert not list(tmp_path.iterdir())
