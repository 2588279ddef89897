"""Text <-> token ids, and chat templates. Imports no torch."""
