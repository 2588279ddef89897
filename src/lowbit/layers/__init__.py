"""What a model is made of; one class each, for every format."""
