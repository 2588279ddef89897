"""Kernels in Triton for NVIDIA GPUs: Ampere (compute capability 8.0) and later.

Nothing here is imported unless ``gpu.runtime.runs_on`` says yes for a device: Triton is an optional
dependency and takes long to import. The same kernels run on CPU tensors in Triton's interpreter, which is how
tests prove them where there is no GPU (``runtime.interpreting``).
"""
