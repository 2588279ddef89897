"""What a quantized number means. Knows torch, nothing else of lowbit but errors."""
