"""How every process of Graft logs: one JSON object a line on standard error, which its supervisor puts into a file."""

import logging
import sys

import structlog


def configure(process: str) -> None:
    """Sets structlog up for this process; every line says which one it is. Call once, first thing in `main`."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            lambda _logger, _method, event: {"process": process, **event},
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
