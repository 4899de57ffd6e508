"""What processes tell Prometheus, on a port of its own that is nobody's by default.

Not on the API's port: figures are those of all projects, and a proxy publishes that port; and a
worker has no other. Labels take few values: route templates and not paths, codes and not words.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import structlog
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

OTHER = "other"

log = structlog.get_logger(__name__)


def new_registry() -> CollectorRegistry:
    """With what Python and the system know of this process."""
    # A second series beside each counter, which nobody asks for.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


class MetricsServer:
    """Answers `GET /metrics` from a thread, until `close`. Port 0: there is none."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        self._server = None
        if port == 0:
            return
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:  # it is watched by others, and works for others
            log.error("metrics cannot be served", host=host, port=port, error=str(error))
        else:
            log.info("metrics are served", host=host, port=port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class FewWords:
    """Label values that were not ours to choose: the first `most` of them, then "other"."""

    def __init__(self, known: Iterable[str] = (), *, most: int) -> None:
        self._known = set(known)
        self._most = most
        self._lock = threading.Lock()

    def __call__(self, word: str) -> str:
        with self._lock:
            if word not in self._known:
                if len(self._known) >= self._most:
                    return OTHER
                self._known.add(word)
        return word
