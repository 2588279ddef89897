"""The commands of ``lowbit``: one module each, imported when the command runs.

A command module has ``USAGE`` (its positional words), ``GROUPS`` (the groups of ``Settings`` whose options
it takes), ``add_arguments(parser)`` for what only it knows, and ``run(arguments) -> exit status``.
"""
