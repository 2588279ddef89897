"""Does ``lowbit serve`` answer on this GPU, and as on the CPU? The real server, a process, asked over HTTP.

    python benchmarks/gpu_serve.py                    # the embedded model if it is cached, else a random one
    python benchmarks/gpu_serve.py --model DIR --flags="--kv-cache-dtype fp8_e4m3"

One greedy answer, the same again (now from the prefix cache), then many prompts of several lengths at once,
sampled and greedy; SIGTERM, and nothing may be left. A second server, on the CPU, then reads what the first
one wrote: log probabilities of its tokens may differ by --gap nats on average, and no greedy token may be
five times that below the CPU's own choice. Where the embedded model answers, it knows a capital. What the
server wrote to its log is printed where something fails. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import made_models

from lowbit.checkpoint.embedded import MODEL_NAME, PACKAGE, VERSION, cache_directory

NEEDED = ("uvicorn", "httptools", "tokenizers", "jinja2", "prometheus_client")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SEEDS = range(12)  # of the prompts that are asked at once
# Some have to wait, and are cut; and few sizes of tiles have to be compiled before the server is ready.
FEW = ("--max-total-tokens", "16384", "--max-running-requests", "8", "--chunked-prefill-size", "256")


class Server:
    """``lowbit serve`` on a free port of this machine."""

    def __init__(self, model: str, device: str, flags: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        words = ["serve", model, "--device", device, "--port", str(port), "--kernel-timings", "off", *flags]
        began = time.monotonic()
        with log.open("w") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "lowbit", *words], stdout=out, stderr=out)
        while not self._is_ready():
            if self.process.poll() is not None:
                raise SystemExit(f"{device}: the server ended with {self.process.returncode}\n{self.said()}")
            time.sleep(0.1)
        self.seconds = round(time.monotonic() - began, 1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def said(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer; what is none ends all with the server's log."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            asked = urllib.request.Request(self.url + path, data, kind)
            with urllib.request.urlopen(asked, timeout=300) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.code} {error.read().decode()}\n{self.said()}") from None
        except OSError as error:
            raise SystemExit(f"{path}: {error}\n{self.said()}") from None

    def counted(self, name: str) -> float:
        """A counter of /metrics, which follow the engine some time behind: 0 only if it is that for 10 s."""
        found, end = 0.0, time.monotonic() + 10
        while not found and time.monotonic() < end:
            with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
                lines = answer.read().decode().splitlines()
            found = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
            time.sleep(0.2)
        return found

    def stop(self) -> None:
        """By SIGTERM, as it is stopped wherever it runs."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"the server did not end in 60 s after SIGTERM\n{self.said()}") from None
        if status:
            raise SystemExit(f"the server ended with {status} after SIGTERM\n{self.said()}")


def a_model() -> tuple[str, bool]:
    """What to serve where nothing is named, and whether it knows anything."""
    if (cache_directory() / f"{PACKAGE}-{VERSION}" / MODEL_NAME).exists():
        return "smollm2", True
    folder = made_models.random_four_bit("tiny")
    if not (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {f"w{number}": number for number in range(32000)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder), False


def body(prompt: list[int], tokens: int, seed: int = 0) -> dict[str, Any]:
    """Of /generate; every third prompt is sampled."""
    warm = 0.7 if seed % 3 == 2 else 0.0
    sampling = {"max_new_tokens": tokens, "temperature": warm, "sampling_seed": seed, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


def prompts() -> list[list[int]]:
    """From one token to several hundred."""
    return [[(7 * at + 13 * seed) % 1000 + 10 for at in range(1 + 37 * seed)] for seed in SEEDS]


def written(server: Server, tokens: int) -> list[list[list[float]]]:
    """What it says to each prompt: log probability and token."""
    first = server.ask("/generate", body(prompts()[1], tokens))
    again = server.ask("/generate", body(prompts()[1], tokens))
    if first["output_ids"] != again["output_ids"]:
        raise SystemExit(f"two greedy answers differ: {first['output_ids']} {again['output_ids']}")
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        asked = [body(prompt, tokens, seed) for seed, prompt in zip(SEEDS, prompts(), strict=True)]
        answers = list(pool.map(lambda one: server.ask("/generate", one), asked))
    return [answer["meta_info"]["output_token_logprobs"] for answer in answers]


def compared(server: Server, given: list[list[list[float]]]) -> dict[str, float]:
    """What another server makes of those answers, read as prompts."""
    differences, gaps = [], []
    for seed, prompt, answer in zip(SEEDS, prompts(), given, strict=True):
        text = [*prompt, *(int(token) for _, token, *_ in answer)]
        asked = {**body(text, 1), "logprob_start_len": len(prompt), "top_logprobs_num": 1}
        meta = server.ask("/generate", asked)["meta_info"]
        read = zip(answer, meta["input_token_logprobs"], meta["input_top_logprobs"], strict=True)
        for (mine, *_), (theirs, *_), [(likeliest, *_)] in read:
            differences.append(abs(mine - theirs))
            if seed % 3 != 2:  # greedy
                gaps.append(likeliest - theirs)
    return {
        "tokens": len(differences),
        "mean_difference": round(sum(differences) / len(differences), 5),
        "largest_difference": round(max(differences), 5),
        "largest_gap": round(max(gaps), 5),
        "not_likeliest": sum(gap > 0 for gap in gaps),
    }


def main() -> None:
    """One line of JSON, or why not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="a checkpoint")
    parser.add_argument("--device", default="cuda", help="of the first server")
    parser.add_argument("--flags", default="", help="further flags of both, in one word")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--gap", type=float, default=0.1, help="nats, on average")
    options = parser.parse_args()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(json.dumps({"benchmark": "gpu_serve", "left out": f"this Python has no {', '.join(missing)}"}))
        return
    model, knows = (options.model, False) if options.model else a_model()
    flags = [*FEW, *shlex.split(options.flags)]
    found: dict[str, object] = {"benchmark": "gpu_serve", "model": model, "device": options.device}
    with tempfile.TemporaryDirectory(prefix="lowbit-serve-") as folder:
        server = Server(model, options.device, flags, Path(folder) / "device.log")
        try:
            answers = written(server, options.tokens)
            found |= {"ready_s": server.seconds, "captured_steps": server.counted("lowbit_captured_steps")}
            if knows:
                asked = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
                said = server.ask("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
                found["answer"] = said
                if "Paris" not in said:
                    raise SystemExit(f"the capital of France: {said!r}\n{server.said()}")
            server.stop()
        finally:
            server.process.kill()
        other = Server(model, "cpu", flags, Path(folder) / "cpu.log")
        try:
            seen = compared(other, answers)
            other.stop()
        finally:
            other.process.kill()
    print(json.dumps(found | seen))
    if seen["mean_difference"] > options.gap or seen["largest_gap"] > 5 * options.gap:
        raise SystemExit(f"the CPU and {options.device} are too far apart: {seen}")


if __name__ == "__main__":
    main()
