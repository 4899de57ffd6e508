"""Tells the database that this worker is there: announced, heard of, gone."""

from __future__ import annotations

import threading

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs import workers
from jobs.db import Database

_JOIN_SECONDS = 1.0  # it may be waiting for a silent database

log = structlog.get_logger(__name__)


class Presence(threading.Thread):
    """Announces the worker when it is made, then keeps its lease; `end` takes it off the list."""

    def __init__(
        self, database: Database, *, name: str, slots: int, gpus: int, lease_seconds: float
    ) -> None:
        super().__init__(name="presence", daemon=True)
        self._database = database
        self._worker = name
        self._slots = slots
        self._gpus = gpus
        self._lease_seconds = lease_seconds
        self._end = threading.Event()
        self._tell()

    def run(self) -> None:
        while not self._end.wait(self._lease_seconds / 4):
            try:
                self._tell()
            except SQLAlchemyError as error:
                log.warning("the worker's lease was not renewed", error=str(error))

    def end(self) -> None:
        self._end.set()
        if self.ident is not None:
            self.join(_JOIN_SECONDS)  # a sign of life that came last would announce the worker anew
        try:
            with self._database.transaction() as session:
                workers.leave(session, self._worker)
        except SQLAlchemyError as error:
            log.warning("the worker stays listed until it is lost", error=str(error))

    def _tell(self) -> None:
        with self._database.transaction() as session:
            if not workers.renew(session, self._worker, lease_seconds=self._lease_seconds):
                workers.announce(
                    session,
                    name=self._worker,
                    slots=self._slots,
                    gpus=self._gpus,
                    lease_seconds=self._lease_seconds,
                )
