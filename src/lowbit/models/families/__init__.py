"""The families the decoder serves: how each spells its config, its tensors and its rows."""
