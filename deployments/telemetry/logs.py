"""Logs of the replicas: a line of JSON for each record, with the id of the video that it is about."""

import json
import logging
from datetime import UTC, datetime

_LOGGERS = ("deployments", "pyramid_serve")


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, and where they are known ``replica``, ``video_id``, ``error``."""

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
    """Write this process's records to stderr as JSON. Called anew, it replaces what was set before."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(replica))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
