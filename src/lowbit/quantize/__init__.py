"""Quantizing float weights: with no data, with calibration data, and how a model is walked for it."""
