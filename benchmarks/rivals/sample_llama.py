"""llama.cpp's sampler chain on given logits: tokens a second, one row after another as it samples.

    python sample_llama.py '{"logits": FILE, "rows": N, "width": N, "rules": [{...}], "repeats": N}'

FILE holds float32 (rows, width). A rule has temperature and may have top_k, top_p and min_p. Each row's
candidates are filled in anew, as llama_sampler_sample does. Prints {"version", "seconds"}, of a row by rule.
"""

from __future__ import annotations

import ctypes
import json
import time
from typing import Any

import llama_cpp
import numpy as np
from line_protocol import options


def chain_of(rule: dict[str, float]) -> Any:
    """In the order in which llama.cpp's own programs have them."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    parts = []
    if "top_k" in rule:
        parts.append(llama_cpp.llama_sampler_init_top_k(int(rule["top_k"])))
    if "top_p" in rule:
        parts.append(llama_cpp.llama_sampler_init_top_p(rule["top_p"], 1))
    if "min_p" in rule:
        parts.append(llama_cpp.llama_sampler_init_min_p(rule["min_p"], 1))
    parts += [llama_cpp.llama_sampler_init_temp(rule["temperature"]), llama_cpp.llama_sampler_init_dist(1)]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


def main() -> None:
    given = options()
    rows, width = given["rows"], given["width"]
    logits = np.fromfile(given["logits"], np.float32).reshape(rows, width)
    kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    candidates, ids = np.zeros(width, dtype=kind), np.arange(width, dtype=np.int32)
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    seconds = []
    for rule in given["rules"]:
        chain, best = chain_of(rule), float("inf")
        for _ in range(given["repeats"]):
            began = time.perf_counter()
            for row in logits:
                candidates["id"], candidates["logit"] = ids, row
                array = llama_cpp.llama_token_data_array(data, width, -1, False)
                llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
                assert 0 <= array.selected < array.size
            best = min(best, (time.perf_counter() - began) / rows)
        seconds.append(best)
        llama_cpp.llama_sampler_free(chain)
    print(json.dumps({"version": llama_cpp.__version__, "seconds": seconds}))


main()
