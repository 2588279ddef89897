"""Files and names. Does not know what a scheme is; imports no torch except in ``tensor_data``."""
