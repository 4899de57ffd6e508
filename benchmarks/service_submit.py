"""Submitting jobs, and listing and getting them among few and among a million.

Submit: 50 clients at once, each one job after the other, with a real spec and plan; every answer
waits for the commit. On SQLite, and on PostgreSQL with its own settings for durability.

List and get: two APIs, one with 20 jobs and one with a million in its database, are asked in turn,
so that whatever else the machine does meets both. Each page has 10 jobs. Asked for: the newest,
those after one in the middle, those in a state that few are in, one by its id, its events. The
newest 10 were submitted; the others are written past the API, small and ended, and alike in both.

`python -m benchmarks.service_submit`: the last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.service_api import Api, Client, percentile, running, say, upload_tiny
from jobs.db import Database
from tests.services import new_database, postgresql_server

CLIENTS = 50
ROWS = 1_000_000
FEW = 10


def submit(api: Api, *, jobs: int = 2000, clients: int = CLIENTS) -> dict[str, float]:
    """Milliseconds of a POST /v1/jobs, and jobs a second."""
    body = json.dumps(upload_tiny(api)).encode()

    async def load() -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        seconds: list[float] = []

        async def one(client: Client, times: int) -> None:
            for _ in range(times):
                seconds.append((await client.ask("POST", "/v1/jobs", body)).seconds)

        opened = [await Client.connect(api) for _ in range(clients)]
        await asyncio.gather(*(one(client, 2) for client in opened))
        seconds.clear()
        started = loop.time()
        await asyncio.gather(*(one(client, jobs // clients) for client in opened))
        took = loop.time() - started
        for client in opened:
            client.close()
        return seconds, took

    seconds, took = asyncio.run(load())
    return {
        "p50_ms": round(1000 * percentile(seconds, 50), 1),
        "p99_ms": round(1000 * percentile(seconds, 99), 1),
        "a_second": round(len(seconds) / took, 1),
    }


def fill(url: str, *, rows: int) -> None:
    """Older jobs by the million beside those that are there, all of them ended, a few as failed,
    each with one event."""
    database = Database(url)
    numbers = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)"
        if database.is_sqlite
        else "WITH n AS (SELECT generate_series(1, :rows) AS i)"
    )
    made_at = (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || i || ' seconds') || '000'"
        if database.is_sqlite
        else "now() - i * interval '1 second'"
    )
    id = "'job_' || substr('0000000000000000000000' || (i * 7919), -22)"
    if not database.is_sqlite:
        id = "'job_' || lpad((i::bigint * 7919)::text, 22, '0')"
    with database.engine.begin() as connection:
        connection.execute(
            text(
                f"""INSERT INTO jobs (id, project_id, name, model_id, dataset_id, spec, plan, state,
                fence, attempts, cancel_requested, last_event, created_at, started_at, finished_at)
                {numbers} SELECT {id}, j.project_id, j.name, j.model_id, j.dataset_id,
                '{{}}', NULL, CASE WHEN i <= 10 OR i % 10000 = 0 THEN 'failed' ELSE 'succeeded' END,
                1, 1, false, 2, {made_at}, {made_at}, {made_at}
                FROM n, (SELECT * FROM jobs LIMIT 1) j"""
            ),
            {"rows": rows},
        )
        connection.execute(
            text(
                f"""INSERT INTO events (job_id, number, project_id, fence, kind, data, created_at)
                {numbers} SELECT {id}, k.number, j.project_id, 1, 'progress', k.data, {made_at}
                FROM n, (SELECT * FROM jobs LIMIT 1) j, (SELECT * FROM events LIMIT 1) k"""
            ),
            {"rows": rows},
        )
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    database.close()


def listing(few: Api, many: Api, *, rows: int, rounds: int = 1000) -> dict[str, Any]:
    """Milliseconds by question, among few and among many, and the largest ratio of the p99s."""

    async def ask() -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {}
        sides = {"few": few, "many": many}
        clients = {name: await Client.connect(api) for name, api in sides.items()}
        questions = {
            "few": await _questions(clients["few"], FEW),
            "many": await _questions(clients["many"], rows),
        }
        chooser = random.Random(0)
        for _ in range(rounds):
            for question in questions["few"]:
                for side in chooser.sample(list(sides), 2):
                    path = chooser.choice(questions[side][question])
                    answer = await clients[side].ask("GET", path)
                    found.setdefault(question, {}).setdefault(side, []).append(answer.seconds)
        for client in clients.values():
            client.close()
        return found

    found = asyncio.run(ask())
    figures: dict[str, Any] = {}
    for question, sides in found.items():
        for side, seconds in sides.items():
            for percent in (50, 99):
                name = f"{question}_{side}_p{percent}_ms"
                figures[name] = round(1000 * percentile(seconds, percent), 2)
        ratio = figures[f"{question}_many_p99_ms"] / figures[f"{question}_few_p99_ms"]
        figures[f"{question}_p99_ratio"] = round(ratio, 2)
    figures["list_p99_ratio"] = max(figures[f"{question}_p99_ratio"] for question in found)
    return figures


async def _questions(client: Client, rows: int) -> dict[str, list[str]]:
    """Paths of each kind, to jobs that `fill` has written, from all over them."""
    ids = [f"job_{i * 7919:022}" for i in range(1, rows - 20, max(1, rows // 400))] or [
        f"job_{i * 7919:022}" for i in range(1, rows + 1)
    ]
    cursors = ids
    if rows == FEW:  # the only one that ten others come after
        cursors = [(await client.ask("GET", "/v1/jobs?limit=10")).json()["next"]]
    return {
        "list": ["/v1/jobs?limit=10"],
        "list_deep": [f"/v1/jobs?limit=10&after={id}" for id in cursors],
        "list_state": ["/v1/jobs?limit=10&state=failed"],
        "get": [f"/v1/jobs/{id}" for id in ids],
        "events": [f"/v1/jobs/{id}/events?limit=10" for id in ids],
    }


@contextmanager
def databases(kind: str, folder: Path) -> Iterator[list[str]]:
    """Two empty databases of a kind, as settings name them."""
    if kind == "sqlite":
        yield [f"sqlite:///{folder / name / 'widthwise.db'}" for name in ("few", "many")]
        return
    with postgresql_server(durable=True) as server:
        yield [new_database(server, name) for name in ("few", "many")]


def measure(kind: str, *, jobs: int, rows: int, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        databases(kind, Path(name)) as (first, second),
        running(Path(name) / "few", database_url=first) as few,
        running(Path(name) / "many", database_url=second) as many,
    ):
        say(f"{kind}: filling {rows} rows")
        for api, url, number in ((few, first, FEW), (many, second, rows)):
            asyncio.run(_submit_some(api, 10))
            fill(url, rows=number)
        for name_, value in listing(few, many, rows=rows, rounds=rounds).items():
            figures[name_] = value
            say(f"{kind}: {name_} {value}")
        for side, api in (("", few), ("_among_many", many)):
            for name_, value in submit(api, jobs=jobs).items():
                figures[f"submit{side}_{name_}"] = value
                say(f"{kind}: submit{side} {name_} {value}")
    return {f"{kind}_{name}": value for name, value in figures.items()}


async def _submit_some(api: Api, number: int) -> None:
    body = json.dumps(await asyncio.to_thread(upload_tiny, api)).encode()
    client = await Client.connect(api)
    for _ in range(number):
        await client.ask("POST", "/v1/jobs", body)
    client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000, help="submitted by all clients together")
    parser.add_argument("--rows", type=int, default=ROWS, help="in the large database")
    parser.add_argument("--rounds", type=int, default=1000, help="of each question")
    parser.add_argument("--on", choices=["sqlite", "postgresql"], nargs="*")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for kind in arguments.on or ["sqlite", "postgresql"]:
        figures |= measure(kind, jobs=arguments.jobs, rows=arguments.rows, rounds=arguments.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
