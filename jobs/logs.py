"""Logs of a process: structlog for our lines and for those of the libraries, on stderr."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from jobs.redaction import redact, redact_all
from jobs.settings import Settings

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the line feed


def _without_control(text: str) -> str:
    """`text` with control characters spelt out: what a request's path or an uploaded file says
    must not move a terminal's cursor. Line feeds stay, for tracebacks."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _redact_values(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _without_control(redact(value))
        elif isinstance(value, BaseException):
            event[key] = redact(repr(value))
        else:
            event[key] = redact_all(value)
    return event


def configure_logging(settings: Settings) -> None:
    """JSON lines or console lines for the whole process. Call it once, at its start."""
    as_json = settings.log_format == "json"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_values,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The prettier one prints local variables, and secrets with them.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for chatty in ("kombu", "alembic", "celery", "amqp"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
