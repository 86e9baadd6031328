"""The logs of the replicas: one line of JSON for each record, with the id of the video that it is about."""

import json
import logging
from datetime import UTC, datetime

_LOGGERS = ("deployments", "pyramid_serve")


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message", "replica"}``, and ``video_id`` and ``error`` where there is one."""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self._replica = replica

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "replica": self._replica,
        }
        if "video_id" in record.__dict__:
            line["video_id"] = record.__dict__["video_id"]
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(replica: str, level: str = "INFO") -> None:
    """Write this process's records to stderr as JSON. A second call replaces what the first one set."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(replica))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
