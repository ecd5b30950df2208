"""Logs as one JSON object a line, with the request id of the call that they belong to."""

import json
import logging
import sys
import time

from services.runtime import tracing
from services.runtime.call import current


class JsonFormatter(logging.Formatter):
    """Writes time, level, logger, request id, message and, if there are, trace id and exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "request": current.get().request_id,
            "message": record.getMessage(),
        }
        if trace := tracing.trace_id():
            line["trace"] = trace
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str) -> None:
    """Log everything from `level` up to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
