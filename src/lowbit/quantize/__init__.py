"""Online quantization: float weights -> QuantizedTensor, by name, recipe and method. Imports no torch."""
