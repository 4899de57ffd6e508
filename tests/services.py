"""Real servers for tests, each on a free port and in a folder of its own.

A server that is not installed fails the test that needs it: nothing is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis

START_SECONDS = 30.0


class ServiceMissing(AssertionError):
    """A server that the tests need is not installed."""


def find_program(name: str, *, package: str, folders: list[Path] | None = None) -> str:
    """A program on the PATH or in one of the folders. ServiceMissing says how to get it."""
    for folder in folders or []:
        if (folder / name).is_file():
            return str(folder / name)
    if found := shutil.which(name):
        return found
    raise ServiceMissing(
        f"{name} is needed by this test: apt-get update && apt-get install -y {package}"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    condition: Callable[[], object], what: str, *, seconds: float = START_SECONDS
) -> None:
    """Returns once `condition` holds; AssertionError if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
        time.sleep(0.02)


@contextmanager
def redis_server(port: int | None = None) -> Iterator[str]:
    """The URL of a fresh, empty Redis."""
    program = find_program("redis-server", package="redis-server")
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="widthwise-redis-") as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--appendonly", "no"]
        with _running(command, folder=Path(folder)):
            url = f"redis://127.0.0.1:{port}/0"
            client = redis.Redis.from_url(url)

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

            wait_until(answers, "redis-server answers")
            client.close()
            yield url


@contextmanager
def postgresql_server(*, durable: bool = False) -> Iterator[str]:
    """The URL of a fresh PostgreSQL, without a database's name: see `new_database`. What it has
    committed need not outlast the machine, unless it is `durable`."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb = find_program("initdb", package="postgresql", folders=folders)
    postgres = find_program("postgres", package="postgresql", folders=folders)
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="widthwise-postgresql-"))
    try:
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        subprocess.run(
            [initdb, "-D", data, "-A", "trust", "-U", "widthwise", "--no-sync", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            user=user,
        )
        port = free_port()
        command = [postgres, "-D", str(data), "-k", str(folder), "-p", str(port)]
        command += ["-h", "127.0.0.1"]
        if not durable:
            command += ["-c", "fsync=off", "-c", "full_page_writes=off"]
        with _running(command, folder=folder, user=user, stop=signal.SIGQUIT):
            address = f"host=127.0.0.1 port={port} user=widthwise dbname=postgres"

            def answers() -> bool:
                try:
                    psycopg.connect(address, connect_timeout=2).close()
                except psycopg.OperationalError:
                    return False
                return True

            wait_until(answers, "postgres answers")
            yield f"postgresql+psycopg://widthwise@127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server_url: str, name: str) -> str:
    """Makes an empty database on the server; its URL."""
    address = server_url.replace("+psycopg", "") + "/postgres"
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{server_url}/{name}"


@contextmanager
def _running(
    command: list[str],
    *,
    folder: Path,
    user: str | None = None,
    stop: signal.Signals = signal.SIGINT,
) -> Iterator[None]:
    output = folder / "output.log"
    with output.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, user=user)
    try:
        yield
    except AssertionError as error:
        if server.poll() is not None:
            raise AssertionError(output.read_text(errors="replace")) from error
        raise
    finally:
        server.send_signal(stop)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
