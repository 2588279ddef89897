"""SGLang's server flags that lowbit does not need, so that a launch line written for SGLang still works.

Three kinds. *Without effect*: lowbit does the thing always, never, or by itself; the flag is accepted and a
note says so. *Only one*: parallel sizes, where 1 is what lowbit does and any other number is refused rather
than ignored. *Refused*: a flag that asks for something lowbit will not do. Every other flag SGLang knows
and lowbit does not is an unknown option like any other. Names from SGLang's server arguments page.
"""

from __future__ import annotations

from typing import Literal

Arity = Literal["switch", "value"]

_CHOSEN = "lowbit chooses kernels itself, see lowbit inspect"
_ALWAYS = "always on"
_NEVER = "lowbit has no such thing"
_SCHEDULER = "lowbit's scheduler sets it itself"
_ONE_DEVICE = "lowbit runs on one device"
_LOGGING = "lowbit never logs prompts"

WITHOUT_EFFECT: dict[str, tuple[Arity, str]] = {
    "--attention-backend": ("value", _CHOSEN),
    "--prefill-attention-backend": ("value", _CHOSEN),
    "--decode-attention-backend": ("value", _CHOSEN),
    "--sampling-backend": ("value", _CHOSEN),
    "--fp8-gemm-backend": ("value", _CHOSEN),
    "--fp4-gemm-backend": ("value", _CHOSEN),
    "--moe-runner-backend": ("value", _CHOSEN),
    "--enable-torch-compile": ("switch", _CHOSEN),
    "--torch-compile-max-bs": ("value", _CHOSEN),
    "--enable-metrics": ("switch", _ALWAYS),
    "--enable-cache-report": ("switch", _ALWAYS),
    "--enable-mixed-chunk": ("switch", _ALWAYS),
    "--enable-fp32-lm-head": ("switch", _ALWAYS),
    "--enable-deterministic-inference": ("switch", _ALWAYS),
    "--incremental-streaming-output": ("switch", _ALWAYS),
    "--skip-server-warmup": ("switch", _NEVER),
    "--disable-overlap-schedule": ("switch", _NEVER),
    "--disable-custom-all-reduce": ("switch", _NEVER),
    "--disable-cuda-graph-padding": ("switch", _NEVER),
    "--cuda-graph-max-bs": ("value", _SCHEDULER),
    "--max-prefill-tokens": ("value", _SCHEDULER),
    "--prefill-max-requests": ("value", _SCHEDULER),
    "--schedule-policy": ("value", _SCHEDULER),
    "--schedule-conservativeness": ("value", _SCHEDULER),
    "--num-continuous-decode-steps": ("value", _SCHEDULER),
    "--radix-eviction-policy": ("value", _SCHEDULER),
    "--sleep-on-idle": ("switch", _ALWAYS),
    "--stream-interval": ("value", "lowbit streams every token"),
    "--tokenizer-mode": ("value", "there is one tokenizer"),
    "--tokenizer-worker-num": ("value", "there is one tokenizer"),
    "--load-format": ("value", "the files say their format"),
    "--model-impl": ("value", "there is one implementation"),
    "--base-gpu-id": ("value", _ONE_DEVICE),
    "--gpu-id-step": ("value", _ONE_DEVICE),
    "--node-rank": ("value", _ONE_DEVICE),
    "--nccl-port": ("value", _ONE_DEVICE),
    "--dist-init-addr": ("value", _ONE_DEVICE),
    "--dist-timeout": ("value", _ONE_DEVICE),
    "--load-balance-method": ("value", _ONE_DEVICE),
    "--enable-p2p-check": ("switch", _ONE_DEVICE),
    "--log-requests": ("switch", _LOGGING),
    "--log-requests-level": ("value", _LOGGING),
    "--log-level-http": ("value", "use --log-level"),
    "--decode-log-interval": ("value", "see /metrics"),
    "--show-time-cost": ("switch", "see /metrics"),
    "--watchdog-timeout": ("value", "the watchdog is set by lowbit"),
    "--soft-watchdog-timeout": ("value", "the watchdog is set by lowbit"),
}

ONLY_ONE: tuple[str, ...] = (
    "--tp-size",
    "--tp",
    "--tensor-parallel-size",
    "--dp-size",
    "--dp",
    "--data-parallel-size",
    "--pp-size",
    "--pp",
    "--pipeline-parallel-size",
    "--ep-size",
    "--ep",
    "--expert-parallel-size",
    "--nnodes",
)

REFUSED: dict[str, str] = {
    "--trust-remote-code": "lowbit never runs code from a model, and no flag turns it on; drop it. "
    "The architectures built in: lowbit models",
}
