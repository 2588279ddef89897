"""Models of the Hugging Face hub: one revision, resolved once, what is needed and its card.

Everything goes through ``huggingface_hub`` (its cache, its login, HF_HUB_OFFLINE, HF_ENDPOINT); a
reference is ``org/name``, or ``org/name:file.gguf`` or ``org/name:Q4_K_M`` for one GGUF file of a repo.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.folder import HQQ_PICKLED, SQUEEZED, own_weights
from lowbit.checkpoint.gguf_file import holds_model
from lowbit.errors import LowbitError, printable

Progress = Callable[[int, int, str], None]

_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([\w.@+/-]{1,200}))?")
_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"),
    *("tokenizer.model.v3", "model.safetensors.index.json"),
    "model.safetensors.index.json.meta.json",
    *("pytorch_model.bin.index.json", "params.json", "tekken.json"),
    *("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),
    *("quanto_qmap.json", "quantization_map.json"),
)
# What people read, by the beginnings of its names; some have endings of no kind (LICENSE.Apache-2.0).
FOR_PEOPLE = ("README", "MODEL_CARD", "LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
_NO_TEXTS = (
    *(".py", ".sh", ".ipynb", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
    *(".zip", ".gz", ".bin", ".pt", ".safetensors", ".gguf"),
)
# What lowbit needs for nothing itself, but a checkpoint written from this one has beside it.
_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_BESIDE_BYTES = 1 << 20

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Reference:
    """``repo``: "org/name". ``file``: a GGUF file's name, or the quantization it has in its name."""

    repo: str
    file: str | None = None

    def __str__(self) -> str:
        return self.repo if self.file is None else f"{self.repo}:{self.file}"


def parse_reference(name: str) -> Reference | None:
    """The hub reference ``name`` spells, or None where it is none."""
    found = _REFERENCE.fullmatch(name)
    return None if found is None else Reference(found[1], found[2])


def fetch(
    reference: Reference, revision: str | None = None, on_progress: Progress | None = None
) -> tuple[Path, str]:
    """(local folder or GGUF file, commit): what is not in the cache is downloaded at one commit."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = revision or constants.DEFAULT_REVISION
    if constants.HF_HUB_OFFLINE:
        try:
            folder = Path(snapshot_download(reference.repo, revision=wanted, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            raise _not_cached(reference, wanted) from None
        return _chosen(folder, reference, _files_in(folder)), folder.name
    try:
        info = HfApi().model_info(reference.repo, revision=wanted, files_metadata=True)
    except Exception as error:
        cached = _from_cache(reference, wanted, error)
        if cached is not None:
            return cached
        raise _explained(error, reference, wanted) from None
    commit = info.sha or wanted
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    names = needed_files(reference, list(sizes))
    beside = [] if names[0].endswith(".gguf") else texts_beside(sizes)
    total, done = sum(sizes[name] for name in (*beside, *names)), 0
    for name in (*beside, *names):
        if on_progress is not None:
            on_progress(done, total, f"{reference.repo}: {name}")
        try:
            file = download(reference, name, commit)
        except LowbitError as error:
            if name not in beside:
                raise
            _log.warning("lowbit: %s is not there: %s", printable(name), error.message)
        done += sizes[name]
    if on_progress is not None:
        on_progress(total, total, reference.repo)
    snapshot = file.parents[name.count("/")]
    _remember(snapshot, wanted, commit)
    return _chosen(snapshot, reference, names), commit


def is_offline() -> bool:
    """Whether the hub's client was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_files(reference: Reference, revision: str | None) -> tuple[str, dict[str, int]] | None:
    """(commit, file name -> bytes), or None where there is no network but a cached copy."""
    from huggingface_hub import HfApi, constants

    wanted = revision or constants.DEFAULT_REVISION
    try:
        info = HfApi().model_info(reference.repo, revision=wanted, files_metadata=True)
    except Exception as error:
        if _from_cache(reference, wanted, error) is not None:
            return None
        raise _explained(error, reference, wanted) from None
    return info.sha or wanted, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def cached_file(reference: Reference, name: str, commit: str) -> Path | None:
    """The file in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(reference.repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


class Ranges:
    """One file of a repo, read in pieces (HTTP Range)."""

    def __init__(self, reference: Reference, name: str, commit: str) -> None:
        from huggingface_hub import hf_hub_url

        self.reference, self.name, self.commit = reference, name, commit
        self.url = hf_hub_url(reference.repo, name, revision=commit)

    def read(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start``; the connection is closed after them even where ranges are "
        "ignored."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers

        if count <= 0:
            return b""
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
        try:
            with get_session().stream("GET", self.url, headers=headers, follow_redirects=True) as response:
                response.raise_for_status()
                skip = 0 if response.status_code == 206 else start
                body = bytearray()
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) >= skip + count:
                        break
        except Exception as error:
            raise _explained(error, self.reference, self.commit) from None
        found = bytes(body[skip : skip + count])
        if len(found) != count:
            raise LowbitError(
                "E0608",
                f"{self.reference.repo}: {printable(self.name)} ends after {len(found)} of {count} bytes "
                "asked for",
            )
        return found


def _remember(snapshot: Path, revision: str, commit: str) -> None:
    """Note in the hub's cache which commit the revision was, as its client does for downloads by name:
    without a network the name then still leads to the files."""
    if revision == commit or not re.fullmatch(r"[\w./-]+", revision) or ".." in revision:
        return
    note = snapshot.parents[1] / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_name(f"{note.name}.part")
    temporary.write_text(commit)
    temporary.replace(note)


def download(reference: Reference, name: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(reference.repo, name, revision=commit))
    except Exception as error:
        raise _explained(error, reference, commit) from None


def _from_cache(reference: Reference, revision: str, error: Exception) -> tuple[Path, str] | None:
    """Without a network a cached model still serves; an answer of the hub is never overruled."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return None
    try:
        folder = Path(snapshot_download(reference.repo, revision=revision, local_files_only=True))
    except Exception:  # not cached: the network's error is the one to tell
        return None
    return _chosen(folder, reference, _files_in(folder)), folder.name


def needed_files(reference: Reference, names: list[str]) -> list[str]:
    """The files of a repo that lowbit reads."""
    if reference.file is not None:
        return _gguf_files(reference, names)
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        pickled = [name for name in names if fnmatch.fnmatchcase(name, "pytorch_model*.bin")]
        pickled = pickled or [name for name in names if name == HQQ_PICKLED]
        squeezed = [name for name in names if fnmatch.fnmatchcase(name, SQUEEZED)]
        pickled = pickled or (squeezed if len(squeezed) == 1 else [])
        ggufs = [name for name in names if name.endswith(".gguf") and holds_model(name)]
        if len(ggufs) == 1:
            return ggufs
        if pickled and not ggufs:
            return [name for name in _SMALL_FILES if name in names] + sorted(pickled)
        if ggufs:
            listed = ", ".join(printable(name) for name in sorted(ggufs)[:12])
            raise LowbitError(
                "E0607",
                f"{reference.repo} holds {len(ggufs)} GGUF files; name one: "
                f"{reference.repo}:<file or type>, of {listed}",
            )
        raise LowbitError(
            "E0607", f"{reference.repo} holds no .safetensors, no .gguf and no pytorch_model.bin file"
        )
    if "model.safetensors" in weights and "model.safetensors.index.json" not in names:
        weights = ["model.safetensors"]
    weights = own_weights(weights)
    return [name for name in _SMALL_FILES if name in names] + sorted(weights)


def texts_beside(sizes: dict[str, int]) -> list[str]:
    """The small texts of a repo that go with a copy of its model: its card, its licence, and the like.

    ``sizes``: file name -> bytes.
    """
    found = []
    for name, size in sizes.items():
        text = name.upper().startswith(FOR_PEOPLE) and not name.lower().endswith(_NO_TEXTS)
        if "/" not in name and size <= _BESIDE_BYTES and (text or name in _BESIDE):
            found.append(name)
    return sorted(found)


def _gguf_files(reference: Reference, names: list[str]) -> list[str]:
    """The file called so, or the one (with all its parts) whose name holds the quantization."""
    wanted = reference.file or ""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wanted in ggufs:
        found = [wanted]
    else:
        pattern = re.compile(
            rf"(?<![A-Za-z0-9]){re.escape(wanted.removesuffix('.gguf'))}(?![A-Za-z0-9_])", re.I
        )
        found = [name for name in ggufs if pattern.search(Path(name).name) and holds_model(name)]
    stems = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name) for name in found}
    if len(stems) != 1:
        listed = ", ".join(printable(name) for name in sorted(ggufs)[:12]) or "none"
        what = "no GGUF file matches" if not stems else f"{len(stems)} GGUF files match"
        raise LowbitError("E0607", f"{reference.repo}: {what} {printable(wanted)!r}; there are: {listed}")
    stem = stems.pop()
    return sorted(name for name in ggufs if re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name) == stem)


def _chosen(folder: Path, reference: Reference, names: list[str]) -> Path:
    """The folder, or the GGUF file in it that was meant."""
    try:
        needed = needed_files(reference, names)
    except LowbitError as error:
        raise LowbitError(error.code, f"{error.message} (in the cache, {folder.name[:12]})") from None
    first = needed[0]
    return folder / first if first.endswith(".gguf") else folder


def _files_in(folder: Path) -> list[str]:
    """The files of a snapshot in the cache, named as the hub lists them: GGUF files may lie in folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _not_cached(reference: Reference, revision: str) -> LowbitError:
    return LowbitError(
        "E0604",
        f"no network and {reference.repo}@{revision} is not in the cache; connect once and run: "
        f"lowbit pull {reference}",
    )


def _explained(error: Exception, reference: Reference, revision: str) -> LowbitError:
    """What the hub's client raised, as one line with the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = reference.repo
    if isinstance(error, RevisionNotFoundError):
        known = _revisions(repo)
        listed = f"; it has: {', '.join(known)}" if known else ""
        return LowbitError("E0601", f"revision {printable(revision)!r} not found in {repo}{listed}")
    if isinstance(error, GatedRepoError):
        return LowbitError(
            "E0603", f"{repo} is gated: accept its licence on the hub, then log in with 'hf auth login'"
        )
    if isinstance(error, RepositoryNotFoundError):
        return LowbitError(
            "E0602", f"repo {repo!r} not found (or private: log in with 'hf auth login'); check the spelling"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "?"
        return LowbitError("E0608", f"the hub answered {status} for {repo}; try again later")
    if type(error).__name__ in ("ConnectionError", "ConnectTimeout", "ConnectError", "OfflineModeIsEnabled"):
        return _not_cached(reference, revision)
    return LowbitError("E0608", f"{repo} could not be fetched: {printable(error)}")


def _revisions(repo: str) -> list[str]:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo)
    except Exception:  # only to make a message better
        return []
    return [printable(ref.name, 40) for ref in [*refs.branches, *refs.tags][:8]]
