"""LowbitError: what a person reads when something cannot be done.

Every message is one line that says where, what, why and how to fix it. The code (``E0203``) fixes the
exit status and the paragraph ``lowbit explain E0203`` prints; both live in ``error_catalogue``.
"""

from __future__ import annotations

EXIT_USAGE = 2  # the command line contradicts itself or the model
EXIT_CHECKPOINT = 3  # the checkpoint is damaged, incomplete or hostile
EXIT_UNSUPPORTED = 4  # a sound checkpoint or wish that lowbit cannot serve here
EXIT_RESOURCES = 5  # not enough memory or disk
EXIT_HUB = 6  # network, hub or package index
EXIT_IO = 7  # the operating system refused to read or write
EXIT_PORT = 8  # the address to listen on is taken or forbidden
EXIT_BUG = 70  # lowbit broke one of its own invariants

_EXIT_BY_PREFIX = {
    "E01": EXIT_USAGE,
    "E02": EXIT_CHECKPOINT,
    "E03": EXIT_IO,
    "E04": EXIT_UNSUPPORTED,
    "E05": EXIT_RESOURCES,
    "E06": EXIT_HUB,
    "E07": EXIT_BUG,
    "E08": EXIT_PORT,
}
_EXIT_EXCEPTIONS = {  # codes whose exit status is not their prefix's
    "E0230": EXIT_UNSUPPORTED,
    "E0240": EXIT_UNSUPPORTED,
    "E0241": EXIT_UNSUPPORTED,
    "E0223": EXIT_UNSUPPORTED,
    "E0401": EXIT_USAGE,
    "E0402": EXIT_USAGE,
    "E0403": EXIT_USAGE,
    "E0406": EXIT_USAGE,
}


class LowbitError(Exception):
    """One line for a person: ``code`` is stable, ``message`` says what, where and the way out."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def exit_code(self) -> int:
        """The process exit status that belongs to the code."""
        return _EXIT_EXCEPTIONS.get(self.code, _EXIT_BY_PREFIX.get(self.code[:3], EXIT_BUG))

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}"


def printable(text: object, limit: int = 120) -> str:
    """Text from a file or a client, made safe to print: control characters escaped, cut at ``limit``."""
    shown = str(text)
    if not shown.isprintable():
        shown = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in shown
        )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def thousands(number: int) -> str:
    """12345678 as ``12 345 678``, the way messages print large numbers."""
    return f"{number:,}".replace(",", " ")
