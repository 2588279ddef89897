"""Quantizing float weights while a model is loaded."""
