"""Live events to 300 watchers: how late they are, and what the API's process spends on it; and how
soon after its submission a job's process is heard of.

Watchers are plain connections in one process beside the API's. A writer in this process puts events
into the database as a worker does, one every fifth of a second, each with the time just before it
was written; a watcher's delay is from there to its arrival. With Redis and PostgreSQL, and with
neither, where the shared poll of half a second is part of the delay.

First event: a real worker, a tiny model, from the submission to the first event that the job's
process tells. `imports_s` is what Python and the paddle half of compression take to be imported
alone, in a process of its own on the same machine.

`python -m benchmarks.service_events`: the last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.service_api import REPOSITORY, Api, Client, percentile, running, say, upload_tiny
from jobs import store
from jobs.db import Database
from jobs.nudges import EventPublisher, Teller
from jobs.states import JobState
from tests.services import new_database, postgresql_server, redis_server

WATCHERS = 300
PAUSE_SECONDS = 0.2
_SENT = re.compile(rb'"sent": ?([0-9.]+)')


def watch(port: int, key: str, job_id: str, watchers: int) -> None:
    """The watchers' process: says "ready" once all are connected, then, when the job has ended, all
    delays in seconds as JSON."""

    async def one(delays: list[float], ready: list[int]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(
            f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {key}\r\n\r\n".encode()
        )
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        while line := await reader.readline():
            if line.startswith(b"event: started"):
                ready.append(1)
            if line.startswith(b"event: succeeded"):
                break
            if sent := _SENT.search(line):
                delays.append(time.time() - float(sent[1]))
        writer.close()

    async def all_of_them() -> list[float]:
        delays: list[float] = []
        ready: list[int] = []
        tasks = [asyncio.create_task(one(delays, ready)) for _ in range(watchers)]
        while len(ready) < watchers:
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        await asyncio.gather(*tasks)
        return delays

    print(json.dumps(asyncio.run(all_of_them())))


def sse(api: Api, *, watchers: int = WATCHERS, events: int = 100) -> dict[str, float]:
    """Milliseconds from an event's writing to its arrival; the share of one core that the API took
    for events at this rate."""
    redis_url = api.settings.get("broker_url")
    publisher = None if redis_url is None else EventPublisher(redis_url)
    teller = Teller(*filter(None, [publisher]))
    url = api.settings.get("database_url", f"sqlite:///{api.data / 'widthwise.db'}")
    database = Database(url, after_commit=teller)
    job_id = asyncio.run(_submit(api))
    with database.transaction() as session:
        claim = store.claim_job(session, job_id, worker="w", lease_seconds=3600, max_runs=3)
    assert claim is not None
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.service_events"),
            *("--watch", str(api.port), api.key, job_id, str(watchers)),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(2)
    idle_from, cpu_from = time.monotonic(), api.cpu_seconds()
    time.sleep(5)
    idle = (api.cpu_seconds() - cpu_from) / (time.monotonic() - idle_from)
    started, cpu_from = time.monotonic(), api.cpu_seconds()
    for number in range(events):
        with database.transaction() as session:
            data = {"stage": "distil", "step": number, "sent": time.time()}
            store.append_events(session, claim, [("progress", data)])
        time.sleep(max(0.0, started + (number + 1) * PAUSE_SECONDS - time.monotonic()))
    busy = (api.cpu_seconds() - cpu_from) / (time.monotonic() - started)
    with database.transaction() as session:
        store.finish_job(session, claim, JobState.SUCCEEDED, report={"selection": None})
    delays = json.loads(process.stdout.readline())
    process.wait()
    teller.close()
    database.close()
    assert len(delays) == watchers * events, (len(delays), watchers * events)
    return {
        "p50_ms": round(1000 * percentile(delays, 50), 1),
        "p99_ms": round(1000 * percentile(delays, 99), 1),
        "cpu_percent": round(100 * busy, 1),
        "idle_cpu_percent": round(100 * idle, 1),
        "rss_mb": round(api.rss_bytes() / 1e6),
    }


async def _submit(api: Api) -> str:
    body = json.dumps(await asyncio.to_thread(upload_tiny, api)).encode()
    client = await Client.connect(api)
    answer = await client.ask("POST", "/v1/jobs", body)
    client.close()
    return str(answer.json()["id"])


def first_event(api: Api, *, times: int = 5) -> dict[str, float]:
    """Medians, in seconds."""
    with _worker(api):
        waits = sorted(_first_event(api) for _ in range(times))
    imports = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(
            [_WORKER_PYTHON, "-c", "import compression.pipeline"], cwd=REPOSITORY, check=True
        )
        imports.append(time.monotonic() - started)
    wait, imported = waits[len(waits) // 2], sorted(imports)[1]
    return {
        "first_event_s": round(wait, 2),
        "imports_s": round(imported, 2),
        "first_event_beyond_imports_s": round(wait - imported, 2),
    }


_WORKER_PYTHON = REPOSITORY / ".venv" / "worker" / "bin" / "python"


@contextmanager
def _worker(api: Api) -> Iterator[None]:
    names = ("database_url", "broker_url", "data_dir")
    environment = {
        f"WIDTHWISE_{name.upper()}": api.settings[name] for name in names if name in api.settings
    }
    environment |= {
        "PATH": os.environ["PATH"],
        "WIDTHWISE_MEASURE_TRAINING": "false",
        "WIDTHWISE_STOP_GRACE_SECONDS": "0.5",
    }
    with (api.data / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [_WORKER_PYTHON, "-m", "worker"],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        while b"worker started" not in (api.data / "worker.log").read_bytes():
            assert process.poll() is None, (api.data / "worker.log").read_text()
            time.sleep(0.1)
        time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _first_event(api: Api) -> float:
    """Of one job, which is cancelled then."""

    async def wait() -> float:
        client, watcher = await Client.connect(api), await Client.connect(api)
        body = json.dumps(await asyncio.to_thread(upload_tiny, api)).encode()
        started = time.monotonic()
        job_id = (await client.ask("POST", "/v1/jobs", body)).json()["id"]
        while True:
            page = (await watcher.ask("GET", f"/v1/jobs/{job_id}/events")).json()
            if any(event["kind"] == "progress" for event in page["items"]):
                break
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - started
        client.close()  # the server closes one that is idle for five seconds
        client = await Client.connect(api)
        await client.ask("POST", f"/v1/jobs/{job_id}/cancel")
        while not page["ended"]:
            await asyncio.sleep(0.2)
            page = (await watcher.ask("GET", f"/v1/jobs/{job_id}/events?limit=200")).json()
        client.close()
        watcher.close()
        return seconds

    return asyncio.run(wait())


def measure(*, watchers: int, events: int, times: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def note(found: dict[str, float], prefix: str) -> None:
        for name, value in found.items():
            figures[prefix + name] = value
            say(f"{prefix}{name} {value}")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_url = stack.enter_context(redis_server())
        server = stack.enter_context(postgresql_server(durable=True))
        production = {"database_url": new_database(server, "w"), "broker_url": redis_url}
        with running(folder / "production", **production) as api:
            note(sse(api, watchers=watchers, events=events), "sse_")
            note(first_event(api, times=times), "")
        with running(folder / "embedded") as api:
            note(sse(api, watchers=watchers, events=events), "sse_embedded_")
            note(first_event(api, times=times), "embedded_")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=WATCHERS)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--times", type=int, default=5, help="jobs whose first event is waited for")
    parser.add_argument("--watch", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        port, key, job_id, watchers = arguments.watch
        watch(int(port), key, job_id, int(watchers))
        return
    found = measure(watchers=arguments.watchers, events=arguments.events, times=arguments.times)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
