"""The hub through huggingface_hub's real client, against a local stand-in of its HTTP API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save

from checkpoint.tiny import write_folder, write_gguf_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name: file name -> content; what was asked for is remembered."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.lost: set[str] = set()  # files that are listed and not given
        self.asked: list[str] = []
        self.ranges: list[tuple[str, int]] = []  # (file, bytes sent)
        self.ignores_ranges = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._serve(head=True)

            def do_GET(self) -> None:
                self._serve(head=False)

            def _answer(self, status: int, body: bytes, head: bool, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if not head:
                    self.wfile.write(body)

            def _serve(self, head: bool) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                if hub.broken:
                    return self._answer(500, b"{}", head)
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self._api("/".join(parts[2:4]), parts[4:], head)
                repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
                content = hub.repos.get(repo, {}).get(name)
                if name in hub.lost:
                    return self._answer(410, b"", head)  # for 500 the hub's client waits and asks again
                if content is None or revision not in (COMMIT, "main"):
                    return self._answer(404, b"", head, X_Error_Code="EntryNotFound")
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                ranges = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if ranges and not hub.ignores_ranges:
                    first, last = int(ranges[1]), min(int(ranges[2]), len(content) - 1)
                    hub.ranges.append((name, last + 1 - first))
                    place = f"bytes {first}-{last}/{len(content)}"
                    return self._answer(206, content[first : last + 1], head, Content_Range=place)
                return self._answer(200, content, head, ETag=etag, X_Repo_Commit=COMMIT)

            def _api(self, repo: str, rest: list[str], head: bool) -> None:
                if repo in hub.gated:
                    return self._answer(403, b"{}", head, X_Error_Code="GatedRepo")
                if repo not in hub.repos:
                    return self._answer(401, b"{}", head, X_Error_Code="RepoNotFound")
                if rest == ["refs"]:
                    refs = {
                        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}],
                        "tags": [{"name": "v1.0", "ref": "refs/tags/v1.0", "targetCommit": COMMIT}],
                        "converts": [],
                    }
                    return self._answer(200, json.dumps(refs).encode(), head, Content_Type="application/json")
                if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                    return self._answer(404, b"{}", head, X_Error_Code="RevisionNotFound")
                info = {
                    "id": repo,
                    "modelId": repo,
                    "sha": COMMIT,
                    "siblings": [
                        {"rfilename": name, "size": len(content)} for name, content in hub.repos[repo].items()
                    ],
                }
                return self._answer(200, json.dumps(info).encode(), head, Content_Type="application/json")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.forks = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = Hub()
    folder = tmp_path_factory.mktemp("repos")

    def files(source: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in source.iterdir()}

    useless = {"README.md": b"# hi", "pytorch_model.bin": b"pickle", "original/consolidated.pth": b"x"}
    useless |= {"README.png": b"picture", "original/LICENSE": b"x", "LICENSE.Apache-2.0": b"terms"}
    made.repos["org/single"] = files(write_folder(folder / "a")) | useless
    made.repos["org/sharded"] = files(write_folder(folder / "b", shards=3)) | useless
    gguf = write_gguf_file(folder / "m.gguf").read_bytes()
    made.repos["org/ggufs"] = {"tiny-Q4_K_M.gguf": gguf, "tiny-Q8_0.gguf": gguf, "tiny-IQ4_XS.gguf": gguf}
    made.repos["org/folders"] = {"Q8_0/tiny-Q8_0.gguf": gguf, "Q4_0/tiny-Q4_0.gguf": gguf, "README.md": b"hi"}
    made.repos["org/onegguf"] = {"tiny.gguf": gguf, "README.md": b"hi"}
    weights = {"a.weight": torch.zeros(512, 1024), "b.weight": torch.ones(7, 3)}
    made.repos["org/big"] = {
        "model.safetensors": save(weights),
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    }
    quantized = Path(__file__).parents[1] / "fixtures" / "modelopt" / "mixed"
    made.repos["org/quantized"] = files(quantized) | useless
    del made.repos["org/quantized"]["expected.safetensors"]
    made.repos["org/nothing"] = {"README.md": b"hi"}
    made.gated.add("org/gated")
    yield made
    made.server.shutdown()
    made.forks.communicate(timeout=10)


SCRIPT = """
import json, sys
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
try:
    header = open_checkpoint(sys.argv[1], sys.argv[2] or None)
    print(json.dumps({"tensors": len(header.tensors), "revision": header.revision, "root": str(header.root)}))
except LowbitError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


HEADERS_SCRIPT = """
import json, os, sys
from lowbit.checkpoint.hub_headers import opened_headers
from lowbit.errors import LowbitError
try:
    with opened_headers(sys.argv[1], sys.argv[2] or None) as header:
        files = {entry.file for entry in header.tensors.values()}
        blocks = sum(os.stat(file).st_blocks * 512 for file in files)
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        print(json.dumps({"shapes": shapes, "revision": header.revision, "blocks": blocks,
                          "size": sum(os.stat(file).st_size for file in files)}))
except LowbitError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


# Imports all that has no settings and forks for each job, which imports the hub's client alone.
FORKS = """
import json, os, sys
import filelock, fsspec, httpx, tqdm, yaml
import lowbit.checkpoint.hub_headers
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    script, sys.argv[1:], environment, output, errors = json.loads(line)
    if not (child := os.fork()):
        os.environ.clear()
        os.environ.update(environment)
        for place, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place)
        status = 1
        try:
            exec(script, {"__name__": "__main__"})
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def open_in_process(
    hub: Hub, home: Path, name: str, revision: str = "", script: str = SCRIPT, **env: str
) -> dict[str, str]:
    """A process of its own, because the hub's client reads its settings when it is imported."""
    hub.asked.clear()
    hub.ranges.clear()
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **env,
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    with TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        job = [script, [name, revision], environment, str(output), str(errors)]
        assert hub.forks.stdin is not None and hub.forks.stdout is not None
        print(json.dumps(job), file=hub.forks.stdin, flush=True)
        status = hub.forks.stdout.readline().strip()
        said = output.read_text()
        assert status == "0" and said, errors.read_text()
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("repo", ["single", "sharded"])
def test_only_what_is_needed_at_one_commit(hub: Hub, repo: str, tmp_path: Path) -> None:
    found = open_in_process(hub, tmp_path, f"org/{repo}")
    assert found.get("tensors") == 12, found
    assert found["revision"] == COMMIT
    files = [path for path in hub.asked if "/resolve/" in path]
    assert files and all(f"/resolve/{COMMIT}/" in path for path in files)
    assert not any(name in path for path in files for name in ("png", ".bin", ".pth", "original"))
    for name, text in (("README.md", "# hi"), ("LICENSE.Apache-2.0", "terms")):
        assert (Path(found["root"]) / name).read_text() == text, "they go with a copy of the model"
    # A second start, without a network, from the cache.
    again = open_in_process(hub, tmp_path, f"org/{repo}", HF_HUB_OFFLINE="1")
    assert again.get("tensors") == 12 and again["revision"] == COMMIT, again
    assert hub.asked == []


@pytest.mark.parametrize("name", ["tiny-Q8_0.gguf", "Q8_0", "q8_0", "IQ4_XS"])
def test_gguf_by_name_or_type(hub: Hub, name: str, tmp_path: Path) -> None:
    found = open_in_process(hub, tmp_path, f"org/ggufs:{name}")
    assert found.get("tensors") == 12, found
    expected = "tiny-IQ4_XS.gguf" if name == "IQ4_XS" else "tiny-Q8_0.gguf"
    assert found["root"].endswith(expected)
    assert {path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path} == {expected}


@pytest.mark.parametrize("without", ["offline", "no server"])
def test_gguf_in_a_folder_of_its_repo(hub: Hub, without: str, tmp_path: Path) -> None:
    """As repos of many types have them; from the cache too."""
    found = open_in_process(hub, tmp_path, "org/folders:Q8_0")
    assert found.get("tensors") == 12 and found["root"].endswith("Q8_0/tiny-Q8_0.gguf"), found
    no_network = {"offline": {"HF_HUB_OFFLINE": "1"}, "no server": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    again = open_in_process(hub, tmp_path, "org/folders:Q8_0", **no_network[without])
    assert again.get("root") == found["root"] and again["revision"] == COMMIT, again


@pytest.mark.parametrize("ignores", [False, True])
def test_headers_alone(hub: Hub, ignores: bool, tmp_path: Path) -> None:
    """Of 2 MiB of weights only the header travels, and the skeleton takes no room."""
    hub.ignores_ranges = ignores
    try:
        found = open_in_process(hub, tmp_path, "org/big", script=HEADERS_SCRIPT)
    finally:
        hub.ignores_ranges = False
    assert found.get("shapes") == {"a.weight": [512, 1024], "b.weight": [7, 3]}, found
    assert found["revision"] == COMMIT and found["size"] > 2 << 20 and found["blocks"] < 64 << 10
    sent = sum(count for name, count in hub.ranges)
    assert ignores or 0 < sent < 1000
    assert not any(file.name == "model.safetensors" for file in tmp_path.rglob("*"))


def test_headers_of_shards_and_ggufs(hub: Hub, tmp_path: Path) -> None:
    assert len(open_in_process(hub, tmp_path, "org/sharded", script=HEADERS_SCRIPT)["shapes"]) == 12
    assert len(open_in_process(hub, tmp_path, "org/ggufs:Q8_0", script=HEADERS_SCRIPT)["shapes"]) == 12


def test_headers_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    open_in_process(hub, tmp_path, "org/single")
    found = open_in_process(hub, tmp_path, "org/single", script=HEADERS_SCRIPT)
    assert len(found["shapes"]) == 12 and hub.ranges == [], "what is there is not fetched again"


INSPECT_SCRIPT = """
import contextlib, io, json, sys
from lowbit.cli import main
held = io.StringIO()
with contextlib.redirect_stdout(held):
    status = main(["inspect", sys.argv[1], "--json", "--tokens", "10", "--strict"])
print(json.dumps({"status": status, **json.loads(held.getvalue() or "{}")}))
"""


def test_inspecting_a_quantized_model_by_ranges(hub: Hub, tmp_path: Path) -> None:
    """The whole command on a hub id: a plan of every layer, and of the weights' file only its header."""
    plan: dict = open_in_process(hub, tmp_path, "org/quantized", script=INSPECT_SCRIPT)
    assert plan["status"] == 0 and plan["format"] == "modelopt" and plan["ignored_layers"], plan
    assert {"model.embed_tokens", "lm_head"} <= set(plan["ignored_layers"])
    schemes = {module["name"].rpartition(".")[2]: module["scheme"] for module in plan["modules"]}
    assert schemes["o_proj"].startswith("e2m1 1x16 e4m3") and schemes["down_proj"].startswith("int8")
    assert 0 < plan["weight_bytes"] < plan["peak_bytes_at_load"] and plan["kv_bytes"] > 0
    weights = hub.repos["org/quantized"]["model.safetensors"]
    header = 8 + int.from_bytes(weights[:8], "little")
    asked = [count for name, count in hub.ranges if name == "model.safetensors"]
    assert header <= sum(asked) < len(weights) // 2, (asked, header, len(weights))
    assert not any(name in path for path in hub.asked for name in ("README", ".bin", ".pth"))
    assert not any(file.name == "model.safetensors" for file in tmp_path.rglob("*"))


def test_headers_of_what_is_refused(hub: Hub, tmp_path: Path) -> None:
    assert open_in_process(hub, tmp_path, "org/nowhere", script=HEADERS_SCRIPT)["code"] == "E0602"
    assert open_in_process(hub, tmp_path, "org/gated", script=HEADERS_SCRIPT)["code"] == "E0603"


def test_repo_of_one_gguf(hub: Hub, tmp_path: Path) -> None:
    assert open_in_process(hub, tmp_path, "org/onegguf").get("tensors") == 12


@pytest.mark.parametrize(
    ("name", "revision", "code", "words"),
    [
        ("org/nowhere", "", "E0602", "org/nowhere"),
        ("org/gated", "", "E0603", "hf auth login"),
        ("org/single", "v9", "E0601", "it has: main, v1.0"),
        ("org/ggufs", "", "E0607", "holds 3 GGUF files"),
        ("org/ggufs:Q2_K", "", "E0607", "no GGUF file matches"),
        ("org/nothing", "", "E0607", "no .safetensors"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, name: str, revision: str, code: str, words: str, tmp_path: Path
) -> None:
    found = open_in_process(hub, tmp_path, name, revision)
    assert found.get("code") == code and words in found["message"], found


def test_offline_and_not_cached(hub: Hub, tmp_path: Path) -> None:
    found = open_in_process(hub, tmp_path, "org/single", HF_HUB_OFFLINE="1")
    assert found.get("code") == "E0604" and "lowbit pull org/single" in found["message"], found


def test_server_error_and_no_server(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    try:
        found = open_in_process(hub, tmp_path, "org/single")
    finally:
        hub.broken = False
    assert found.get("code") == "E0608" and "500" in found["message"], found
    gone = open_in_process(hub, tmp_path, "org/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.get("code") == "E0604", gone
    open_in_process(hub, tmp_path, "org/single")
    cached = open_in_process(hub, tmp_path, "org/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert cached.get("tensors") == 12, cached


def test_texts_beside_the_weights(hub: Hub, tmp_path: Path) -> None:
    """Small ones of a folder's root; one that does not come is no reason not to serve."""
    from lowbit.checkpoint.hub import texts_beside

    wanted = ["COPYING", "LICENSE-MODEL.txt", "MODEL_CARD.md", "NOTICE", "Readme.md", "USE_POLICY.md"]
    wanted = sorted([*wanted, "preprocessor_config.json"])
    others = ["README.py", "LICENSE.pdf", "docs/README.md", "config.json", "img.png", "training_args.bin"]
    assert texts_beside(dict.fromkeys([*wanted, *others], 1000)) == wanted
    assert texts_beside(dict.fromkeys(wanted, 2 << 20)) == []
    hub.lost.add("README.md")
    try:
        found = open_in_process(hub, tmp_path, "org/single")
    finally:
        hub.lost.clear()
    assert found.get("tensors") == 12, found
    assert not (Path(found["root"]) / "README.md").exists()
    open_in_process(hub, tmp_path, "org/single")
    assert (Path(found["root"]) / "README.md").exists(), "the next start asks again"


def test_pickled_weights_are_fetched_where_there_are_no_others() -> None:
    from lowbit.checkpoint.hub import Reference, needed_files

    pickled = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    pickled += ["pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt"]
    seeing = ["m-Q8_0.gguf", "mmproj-m-Q8_0.gguf"]
    assert needed_files(Reference("org/x"), seeing) == ["m-Q8_0.gguf"]
    assert needed_files(Reference("org/x", "Q8_0"), seeing) == ["m-Q8_0.gguf"]
    assert needed_files(Reference("org/x", seeing[1]), seeing) == ["mmproj-m-Q8_0.gguf"]
    needed = needed_files(Reference("org/x"), pickled)
    assert set(pickled) - set(needed) == {"training_args.bin", "optimizer.pt"}
    needed = needed_files(Reference("org/x"), [*pickled, "model.safetensors"])
    assert not any(name.endswith(".bin") for name in needed)
    mistral = ["params.json", "tekken.json", "consolidated.safetensors"]
    assert needed_files(Reference("org/x"), mistral) == [
        "params.json",
        "tekken.json",
        "consolidated.safetensors",
    ]
