"""docs's example of a proxy, docker/nginx.conf, run by a real nginx in front of a real API."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import Service, archive
from tests.builders import tiny_bert
from tests.services import find_program, free_port, wait_until

SHIPPED = Path(__file__).resolve().parents[2] / "docker/nginx.conf"


def _program() -> str:
    return find_program("nginx", package="nginx-light", folders=[Path("/usr/sbin")])


def _substituted(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@contextmanager
def _nginx(folder: Path, service: Service) -> Iterator[str]:
    """The shipped file with other ports, folders and waiting times, and nothing else changed."""
    port = free_port()
    text = SHIPPED.read_text()
    text = _substituted(text, "server 127.0.0.1:8000;", f"server 127.0.0.1:{service.port};")
    text = _substituted(text, "listen 8080;", f"listen 127.0.0.1:{port};")
    text = _substituted(text, "client_header_timeout 10s;", "client_header_timeout 1s;")
    text = _substituted(text, "client_body_timeout 60s;", "client_body_timeout 1s;")
    text = text.replace("/tmp/nginx-widthwise", f"{folder}/nginx")
    configuration, log = folder / "nginx.conf", folder / "error.log"
    configuration.write_text(text)
    command = [_program(), "-e", str(log), "-c", str(configuration), "-g", "daemon off;"]
    server = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: server.poll() is not None or _answers(port), "nginx answers")
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, service: Service) -> Iterator[str]:
    with _nginx(tmp_path_factory.mktemp("nginx"), service) as url:
        yield url


def test_nginx_finds_no_fault_with_the_file_as_it_is(tmp_path: Path) -> None:
    command = [_program(), "-t", "-e", str(tmp_path / "log"), "-c", str(SHIPPED)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr


def test_the_api_is_served_through_it(proxy: str, service: Service, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=proxy, headers=headers, timeout=60, trust_env=False) as client:
        content = archive(tiny_bert(tmp_path / "model"))
        made = client.post("/v1/models?filename=m.tar.gz", content=content)
        assert made.status_code == 201, made.text
        found = client.get(made.headers["location"])
        assert found.json()["id"] == made.json()["id"]
        assert found.headers["x-frame-options"] == "DENY"
        assert not re.search(r"nginx/", found.headers.get("server", ""))


@pytest.mark.parametrize("head", [b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_is_not_sent_in_time_ends_its_connection(proxy: str, head: bytes) -> None:
    port = int(proxy.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head)
        try:
            rest = connection.recv(2**16)
        except ConnectionResetError:
            rest = b""
        assert rest == b"" or b" 408 " in rest


def test_a_head_that_is_too_large_is_refused(proxy: str) -> None:
    answer = httpx.get(f"{proxy}/healthz", headers={"X-Long": "x" * 100_000}, trust_env=False)
    assert answer.status_code == 400


def test_an_upload_that_is_too_large_is_refused_unread(proxy: str, service: Service) -> None:
    port = int(proxy.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/models?filename=m.zip HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + service.key.encode()
            + b"\r\nContent-Length: 999999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(2**16)
