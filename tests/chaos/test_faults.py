"""Faults that take a message, while the other lane may take Redis away."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from tests.chaos import faults
from tests.chaos.faults import Injector
from tests.chaos.plan import Fault, Kind


class _Client:
    """Answers as it is told: an answer is returned, an error raised."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.pushed: list[object] = []

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _answer(self) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def brpop(self, *told: object, **more: object) -> object:
        return self._answer()

    def lpush(self, *told: object) -> None:
        self._answer()
        self.pushed.extend(told)


AWAY = [redis.ConnectionError("refused"), redis.TimeoutError("no answer")]
FOUND = (b"queue", b"message")


def injected(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, *answers: object
) -> tuple[bool, list[object]]:
    """Whether it counts, and what was pushed."""
    client = _Client(*answers)
    monkeypatch.setattr(faults, "redis", SimpleNamespace(**{**vars(redis), "Redis": _From(client)}))
    site: Any = SimpleNamespace(redis=SimpleNamespace(url="redis://nowhere"))
    done = Injector(site, threading.Event()).inject(Fault(0, kind, 0, 0.0, 0.0))
    assert client.answers == []
    return done is not None, client.pushed


class _From:
    def __init__(self, client: _Client) -> None:
        self.from_url = lambda url: client


@pytest.mark.parametrize("away", AWAY, ids=repr)
def test_a_message_is_waited_for_while_redis_is_away(
    monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    assert injected(monkeypatch, Kind.MESSAGE_DROPPED, away, None, FOUND) == (True, [])
    doubled = [b"queue", b"message", b"message"]
    assert injected(monkeypatch, Kind.MESSAGE_DOUBLED, away, FOUND, None) == (True, doubled)


@pytest.mark.parametrize("away", AWAY, ids=repr)
def test_what_cannot_be_put_back_does_not_count_as_doubled(
    monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    assert injected(monkeypatch, Kind.MESSAGE_DOUBLED, FOUND, away) == (False, [])
