"""The API as a process of its own, and clients that cost little: what benchmarks of it share.

`python -m api` runs in the API's environment, with no limit of requests. A client is one kept-open
connection that writes prepared bytes and reads the answer's length from its header: the machine is
shared with the server that is measured, and an HTTP library would take as much of it.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builders import tiny_bert, tiny_dataset
from tests.services import free_port, wait_until

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Api:
    """A running one. `pid`: of its process; `data`: its folder."""

    port: int
    key: str
    pid: int
    data: Path
    settings: dict[str, str]

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection. Requests one after the other, each timed from its first byte to the last of
    its answer."""

    def __init__(
        self, api: Api, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._api = api
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, api: Api) -> Client:
        return cls(api, *await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 20))

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """RuntimeError for a status of 400 or more: what is measured must be what is meant."""
        lines = {
            "Host": "127.0.0.1",
            "Authorization": f"Bearer {self._api.key}",
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }
        head = f"{method} {path} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        started = time.perf_counter()
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        length = answer.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
        content = await self._reader.readexactly(int(length))
        seconds = time.perf_counter() - started
        if status >= 400:
            raise RuntimeError(f"{method} {path}: {content.decode()}")
        return Answer(status, seconds, content)

    def close(self) -> None:
        self._writer.close()


@contextmanager
def running(data: Path, **settings: str) -> Iterator[Api]:
    """The API on a free port; `settings` are its variables without the prefix, in lower case."""
    port = free_port()
    chosen = {"data_dir": str(data), "port": str(port), "rate_limit_per_minute": "0", **settings}
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "WIDTHWISE_LOG_LEVEL": "warning",
        **{f"WIDTHWISE_{name.upper()}": value for name, value in chosen.items()},
    }
    python = REPOSITORY / ".venv" / "api" / "bin" / "python"
    data.mkdir(parents=True, exist_ok=True)
    with (data / "api.log").open("wb") as log:
        process = subprocess.Popen(
            [python, "-m", "api"], cwd=REPOSITORY, env=environment, stderr=log
        )
    try:

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError((data / "api.log").read_text())
            return bool(asyncio.run(_is_there(port)))

        wait_until(answers, "the API answers", seconds=60)
        key = (data / "api_key").read_text().strip()
        yield Api(port, key, process.pid, data, chosen)
    finally:
        process.terminate()
        process.wait(30)


async def _is_there(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def upload_tiny(api: Api) -> dict[str, Any]:
    """A job's body, of a tiny BERT and a dataset that are uploaded now."""

    async def upload() -> dict[str, Any]:
        client = await Client.connect(api)
        ids = {}
        with tempfile.TemporaryDirectory() as folder:
            made = {
                "model": tiny_bert(Path(folder) / "model"),
                "dataset": tiny_dataset(Path(folder) / "dataset"),
            }
            for kind, path in made.items():
                buffer = io.BytesIO()
                with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
                    tar.add(path, arcname=path.name)
                where = f"/v1/{kind}s?filename={kind}.tar.gz"
                headers = {"Content-Type": "application/octet-stream"}
                answer = await client.ask("POST", where, buffer.getvalue(), **headers)
                ids[kind] = answer.json()["id"]
        client.close()
        return {**ids, "spec": {"task": {"max_seq_len": 32}}}

    return asyncio.run(upload())


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
