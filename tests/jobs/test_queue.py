from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import pytest
from celery import Celery

from jobs.devices import Device
from jobs.queue import QUEUE, RUN_JOB, enqueue_job, make_celery, queue_of
from jobs.settings import Settings
from tests.services import free_port


def settings_for(broker: str, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    if broker == "redis":
        return Settings(data_dir=tmp_path / "data", broker_url=request.getfixturevalue("redis_url"))
    return Settings(data_dir=tmp_path / "data")


def drain(app: Celery, found: Callable[[str], None], name: str = queue_of(Device.CPU)) -> None:
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.amqp.queues[name])
        misses = 0
        while misses < 2:
            try:
                message = queue.get(block=False)
            except Empty:
                misses += 1
                continue
            assert message.headers["task"] == RUN_JOB
            (args, _, _) = message.payload
            found(args[0])
            message.ack()
        queue.close()


@pytest.mark.parametrize("broker", ["folder", "redis"])
def test_each_message_is_taken_once(
    broker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    app = make_celery(settings_for(broker, tmp_path, request))
    sent = [f"job_{number}" for number in range(40)]
    for job_id in sent:
        assert enqueue_job(app, job_id)
    taken: list[str] = []
    threads = [threading.Thread(target=drain, args=(app, taken.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(sent)
    app.close()


@pytest.mark.parametrize("broker", ["folder", "redis"])
def test_each_device_has_a_queue_of_its_own(
    broker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    app = make_celery(settings_for(broker, tmp_path, request))
    for device in Device:
        assert enqueue_job(app, f"job_{device}", device)
    for name, wanted in (
        (QUEUE, []),
        ("widthwise-gpu", ["job_gpu"]),
        ("widthwise-cpu", ["job_cpu"]),
    ):
        taken: list[str] = []
        drain(app, taken.append, name)
        assert taken == wanted
    app.close()


def test_the_folder_queue_stays_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise AssertionError("the system's folder for temporary files was asked for")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.chdir(tmp_path)
    app = make_celery(Settings(data_dir=tmp_path / "data"))
    enqueue_job(app, "job_1")
    assert len(list((tmp_path / "data" / "broker" / "waiting").iterdir())) == 1
    taken: list[str] = []
    drain(app, taken.append)
    assert taken == ["job_1"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    app.close()


def test_a_queue_that_is_away_is_told_and_does_no_harm(tmp_path: Path) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    app = make_celery(Settings(data_dir=tmp_path, broker_url=away))
    assert enqueue_job(app, "job_1") is False
    app.close()
