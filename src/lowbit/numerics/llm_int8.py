"""LLM.int8 as bitsandbytes 0.50 computes it: what its checkpoints and its online method share.

Weights are int8 with one scale a row, inputs int8 with one scale a token beside outlier columns: a column
of x in which any token of the call has a number of at least the threshold is not rounded, for all of them. A
token's scale is its largest |x| below the threshold, over 127; what is small in an outlier column counts.
So a token's result depends on the tokens beside it, as it does in the tool.

Source: LLM.int8 (Dettmers et al., 2022).
"""

from __future__ import annotations

from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

# The tool multiplies a row's largest |w| by this float32 where the definition says / 127.
INT8_STEP = 7.874015718698502e-3
DEFAULT_THRESHOLD = 6.0
# The tool's inputs are float16, whose smallest number is 2^-24. Numbers in outlier columns are divided by the
# scale: with this floor that overflows for no input that can be computed with.
SMALLEST_SCALE = 2.0**-31


def llm_int8_inputs(threshold: float = DEFAULT_THRESHOLD) -> ActivationScheme:
    """int8 inputs beside outlier columns; a threshold of 0: without any."""
    return ActivationScheme(
        number_format("int8"),
        (1, 0),
        limit=127.0,
        outliers=threshold,
        floor=SMALLEST_SCALE if threshold else 0.0,
    )
