"""Real servers for tests, each on a free port and in a folder of its own.

A server that is not installed fails the test that needs it: nothing is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
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
def redis_server(
    options: Sequence[str] = ("--save", "", "--appendonly", "no"), *, port: int | None = None
) -> Iterator[str]:
    """The URL of a fresh, empty Redis; `options` are its program's, and may name a folder."""
    program = find_program("redis-server", package="redis-server")
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="widthwise-redis-") as folder:
        command = [program, *options, "--port", str(port), "--bind", "127.0.0.1"]
        if "--dir" not in options:
            command += ["--dir", folder]
        with _running(command, folder=Path(folder)):
            url = f"redis://127.0.0.1:{port}/0"
            client = redis.Redis.from_url(url)

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.AuthenticationError:
                    return True
                except redis.ConnectionError:
                    return False

            wait_until(answers, "redis-server answers")
            client.close()
            yield url


def postgresql_program(name: str) -> str:
    """One of PostgreSQL's, also where Debian keeps those that are not on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return find_program(name, package="postgresql", folders=folders)


@contextmanager
def postgresql_server(*, durable: bool = False) -> Iterator[str]:
    """The URL of a fresh PostgreSQL, without a database's name: see `new_database`. What it has
    committed need not outlast the machine, unless it is `durable`."""
    with (
        postgresql_folder() as folder,
        running_postgresql(folder, port=free_port(), durable=durable) as url,
    ):
        yield url


@contextmanager
def postgresql_folder() -> Iterator[Path]:
    """A new folder with an empty PostgreSQL in it, which does not run."""
    initdb, user = postgresql_program("initdb"), _postgresql_user()
    folder = Path(tempfile.mkdtemp(prefix="widthwise-postgresql-"))
    try:
        if user:
            shutil.chown(folder, user)
        command = [initdb, "-D", folder / "data", "-A", "trust", "-U", "widthwise", "-E", "UTF8"]
        subprocess.run(
            [*command, "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            user=user,
        )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running_postgresql(folder: Path, *, port: int, durable: bool = False) -> Iterator[str]:
    """The URL of what `postgresql_folder` made, once it answers; it is stopped as by a crash, and
    may be started again."""
    command = [postgresql_program("postgres"), "-D", str(folder / "data"), "-k", str(folder)]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    if not durable:
        command += ["-c", "fsync=off", "-c", "full_page_writes=off"]
    with _running(command, folder=folder, user=_postgresql_user(), stop=signal.SIGQUIT):
        address = f"host=127.0.0.1 port={port} user=widthwise dbname=postgres"

        def answers() -> bool:
            try:
                psycopg.connect(address, connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        wait_until(answers, "postgres answers")
        yield f"postgresql+psycopg://widthwise@127.0.0.1:{port}"


def _postgresql_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    return "postgres" if os.getuid() == 0 else None


def new_database(server_url: str, name: str) -> str:
    """Makes an empty database on the server; its URL."""
    address = server_url.replace("+psycopg", "") + "/postgres"
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{server_url}/{name}"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A fresh S3 server (moto's) with a bucket named "bucket": the variables by which it is
    found, as an operator sets them."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="widthwise-s3-") as folder:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with _running(command, folder=Path(folder)):

            def answers() -> bool:
                try:
                    request = urllib.request.Request(f"{url}/bucket", method="PUT")
                    return bool(urllib.request.urlopen(request, timeout=5).status == 200)
                except OSError:
                    return False

            wait_until(answers, "moto's server answers")
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "tests",
                "AWS_SECRET_ACCESS_KEY": "tests",
                "AWS_REGION": "us-east-1",
            }


@contextmanager
def nginx_server(server: str, *, port: int) -> Iterator[str]:
    """The URL of an nginx with one server block, whose inside this is; it listens on `port`."""
    program = find_program("nginx", package="nginx", folders=[Path("/usr/sbin")])
    with tempfile.TemporaryDirectory(prefix="widthwise-nginx-") as name:
        folder = Path(name)
        user = "user root;" if os.getuid() == 0 else ""  # who reads what the tests wrote
        paths = " ".join(
            f"{module}_temp_path {folder}/{module};"
            for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;\n"
            f"events {{}}\nhttp {{ access_log off; sendfile on; tcp_nopush on; {paths}\n"
            f"server {{ listen 127.0.0.1:{port};\n{server}\n}} }}\n"
        )
        command = [program, "-p", name, "-c", str(configuration), "-e", "stderr"]
        with _running(command, folder=folder, stop=signal.SIGTERM):
            wait_until(lambda: _listens(port), "nginx listens")
            yield f"http://127.0.0.1:{port}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
