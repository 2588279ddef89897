"""Files against what is known of them from outside: SHA256SUMS, or the names of the hub cache's blobs."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.checkpoint.hashes import check_hash, expected_hashes
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.rules import Report
from lowbit.errors import LowbitError


def check_hashes(
    header: CheckpointHeader, report: Report, on_progress: Callable[[int, int, str], None] | None = None
) -> None:
    """A finding for each file whose hash is another; one flipped bit is enough."""
    try:
        known = expected_hashes(header)
    except LowbitError as error:
        report.add_error(error, "D001")
        return
    done, total = 0, sum(file.stat().st_size for file in known if file.is_file())
    for file, expected in known.items():

        def told(count: int, name: str = file.name) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(done, total, f"hash of {name}")

        try:
            check_hash(file, expected, told)
        except LowbitError as error:
            report.whole = False
            report.add_error(error, "D006", file=file.name)
