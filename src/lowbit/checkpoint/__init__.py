"""Files and names. Does not know what a scheme is; imports no torch except in ``tensor_data``."""

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.source import open_checkpoint

__all__ = ["CheckpointHeader", "TensorEntry", "open_checkpoint"]
