"""What every request and answer passes through: headers, sizes, time."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.main import MAX_JSON_BYTES
from api.middleware import SECURITY_HEADERS
from api.protocol import MAX_HEAD_BYTES
from tests.api.conftest import Service, assert_problem, serving

ORIGIN = "https://portal.example"


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that waits half a second for a body, and says that it is there by HTTPS alone."""
    with serving(
        tmp_path_factory.mktemp("hurried") / "data",
        body_timeout_seconds=0.5,
        hsts_seconds=86400,
        cors_origins=(ORIGIN,),
    ) as running:
        yield running


# --- security headers -----------------------------------------------------------------------


def test_every_answer_has_the_security_headers(hurried: Service) -> None:
    client = hurried.client
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    answers = [
        client.get("/healthz"),
        client.get("/v1/jobs"),
        client.head("/v1/jobs"),
        client.get("/v1/jobs", headers={"Authorization": "Bearer wrong"}),
        client.get("/nowhere"),
        client.delete("/v1/jobs"),
        client.post("/v1/jobs", content=b"{"),
        client.post("/v1/models?filename=m.zip", content=b"no zip"),
        client.options("/v1/jobs", headers=preflight),
        client.get("/openapi.json"),
        client.get("/docs/swagger-ui.css"),
    ]
    assert {answer.status_code for answer in answers} == {200, 401, 404, 405, 415, 422}
    for answer in answers:
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers.get_list(name) == [value], answer.request.url
        assert answer.headers["strict-transport-security"] == "max-age=86400"


def test_hsts_is_said_by_setting_alone(client: httpx.Client) -> None:
    assert "strict-transport-security" not in client.get("/healthz").headers


def test_the_docs_page_has_a_policy_of_its_own_that_its_script_fits(client: httpx.Client) -> None:
    answer = client.get("/docs")
    (policy,) = answer.headers.get_list("content-security-policy")
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == directives["frame-ancestors"] == "'none'"
    (inline,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert directives["script-src"] == f"'self' 'sha256-{digest}'"
    assert "unsafe-inline" not in directives["script-src"]
    assert not re.search(r"<[^>]*\son[a-z]+=", answer.text)  # no handlers, which it would refuse


# --- sizes ----------------------------------------------------------------------------------


def _json_routes(service: Service) -> list[tuple[str, str]]:
    document = service.client.get("/openapi.json").json()
    return [
        (method.upper(), re.sub(r"\{[a-z_]+\}", "x", path))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]


def test_every_json_route_refuses_a_body_that_is_too_large(service: Service) -> None:
    routes = _json_routes(service)
    assert len(routes) >= 4
    large = json.dumps({"name": "x" * MAX_JSON_BYTES}).encode()

    def in_pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 2**16):
            yield large[start : start + 2**16]

    headers = {"Content-Type": "application/json"}
    for method, path in routes:
        for content in (large, in_pieces()):  # the length told, and not told
            answer = service.client.request(method, path, content=content, headers=headers)
            assert_problem(answer, 413, "content-too-large")


def test_a_length_that_is_too_large_is_refused_before_the_body(service: Service) -> None:
    with _connection(service) as connection:
        _send_head(connection, service, "/v1/jobs", f"Content-Length: {10**12}")
        answer = _received(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


FILLERS = (b"X-Filler: " + b"x" * 1000 + b"\r\n", b"x" * 1000)


def _assert_hangs_up(connection: socket.socket, endless: bytes) -> None:
    sent = 0
    try:
        while sent < 100 * MAX_HEAD_BYTES:
            sent += connection.send(endless)
            time.sleep(0.0002)
    except OSError:
        return
    pytest.fail(f"it has taken {sent} bytes")


@pytest.mark.parametrize("endless", FILLERS)
def test_a_head_without_an_end_is_refused(service: Service, endless: bytes) -> None:
    with _connection(service) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ")
        _assert_hangs_up(connection, endless)
    assert service.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("endless", FILLERS)
@pytest.mark.parametrize("beside", [b"0\r\nX-Long: ", b"1;long="], ids=["trailer", "extension"])
def test_a_chunked_body_has_little_beside_its_bytes(
    service: Service, beside: bytes, endless: bytes
) -> None:
    """Which the parser gathers, and the time for a body gives a minute for."""
    with _connection(service) as connection:
        _send_head(connection, service, "/v1/keys", "Transfer-Encoding: chunked")
        connection.sendall(b"1\r\n{\r\n" + beside)
        _assert_hangs_up(connection, endless)
    assert service.client.get("/healthz").status_code == 200


def test_a_head_of_usual_size_is_read(service: Service) -> None:
    headers = {f"X-{i}": "x" * 1000 for i in range(40)}
    for _ in range(3):  # on one connection
        assert service.client.get("/healthz", headers=headers).status_code == 200


# --- bodies that stand still ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/jobs", ""),
        ("/v1/models?filename=m.tar.gz", ""),
        ("/v1/datasets?filename=train.csv", ""),
        ("/v1/datasets", "Content-Type: multipart/form-data; boundary=b\r\n"),
    ],
)
def test_a_body_that_stands_still_is_dropped(hurried: Service, path: str, more: str) -> None:
    before = hurried.kept()
    for length in ("Content-Length: 1000", "Transfer-Encoding: chunked"):
        with _connection(hurried) as connection:
            _send_head(connection, hurried, path, more + length)
            body = (
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="train.csv"\r\n\r\n'
            )
            connection.sendall(body if length[0] == "C" else b"%x\r\n%s\r\n" % (len(body), body))
            answer = _received(connection)  # to the connection's end
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        problem = json.loads(content)
        assert problem["type"] == "urn:widthwise:problem:request-timeout"
        assert "0.5 seconds" in problem["detail"]
    assert hurried.kept() == before


def test_a_slow_body_that_moves_is_read(hurried: Service) -> None:
    body = json.dumps({"name": "slow", "role": "viewer"}).encode()
    with _connection(hurried) as connection:
        length = f"Content-Length: {len(body)}"
        _send_head(connection, hurried, "/v1/keys", f"Content-Type: application/json\r\n{length}")
        for start in range(0, len(body), 10):
            time.sleep(0.2)
            connection.sendall(body[start : start + 10])
        assert connection.recv(100).startswith(b"HTTP/1.1 201 ")


def test_what_takes_long_after_its_body_is_not_dropped(hurried: Service, tmp_path: Path) -> None:
    """The time counts for the body alone: an inspection, or an event stream, may take longer."""
    job_id = hurried.new_job()  # which uploads and inspects a model, and that takes longer
    headers = {"Accept": "text/event-stream"}
    with hurried.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as stream:
        claim = hurried.claim(job_id)
        time.sleep(1)
        hurried.add_events(claim, ("progress", {"step": 1}))
        lines: Any = stream.iter_lines()
        assert any(line == "event: progress" for line in lines)


def _connection(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=30)


def _send_head(connection: socket.socket, service: Service, path: str, more: str) -> None:
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\n"
        f"{more}\r\n\r\n".encode()
    )


def _received(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    answer = b""
    while piece := connection.recv(2**16):
        answer += piece
    return answer


def test_a_refused_head_has_the_security_headers_of_every_answer(service: Service) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX: "
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(head + b"a" * (MAX_HEAD_BYTES + 1 - len(head)))
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    status, *lines = answer.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
    assert status == "HTTP/1.1 431 Request Header Fields Too Large"
    found = dict(line.split(": ", 1) for line in lines)
    assert {
        name.lower(): value for name, value in SECURITY_HEADERS.items()
    }.items() <= found.items()
