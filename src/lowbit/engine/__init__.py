"""Continuous batching over a paged KV cache with a radix prefix cache."""
