"""Log lines as JSON on stderr: one object a line, control characters escaped, no prompt text."""

from __future__ import annotations

import json
import logging
import sys
import time

LOGGER = logging.getLogger("lowbit.server")


class JsonFormatter(logging.Formatter):
    """``logger.info("request", extra={"values": {"status": 200}})`` as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; json.dumps escapes every control character."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "values", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send lowbit's and uvicorn's log to stderr. A closed stderr or a full disk never stops serving."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, lowest in (("lowbit.server", level.upper()), ("uvicorn", "CRITICAL")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(lowest)
        logger.propagate = False


def log(level: int, event: str, **values: object) -> None:
    """One line with its values."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, extra={"values": values})
