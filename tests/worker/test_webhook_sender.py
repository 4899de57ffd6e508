"""One message to a real receiver on the loopback: what arrives, and what is not called at all."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from jobs.webhook_signing import new_secret
from jobs.webhooks import Attempt
from tests.receiver import Receiver, receiving, self_signed, with_status
from tests.services import free_port, wait_until
from worker.webhook_sender import MAX_ANSWER_BYTES, Sender

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
SECRET = new_secret()
BODY = b'{"type":"job.succeeded","data":{}}'


def attempt_at(url: str) -> Attempt:
    return Attempt("dlv_x", "whk_x", "prj_default", 1, url, SECRET, BODY)


def sender(**changes: Any) -> Sender:
    return Sender(**{"timeout_seconds": 10, "allowed": LOOPBACK, **changes})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def test_what_arrives_is_signed_as_the_kept_library_checks(receiver: Receiver) -> None:
    url = f"http://127.0.0.1:{receiver.port}/hook/%20?a=b"
    outcome = sender().send(attempt_at(url))
    assert (outcome.status, outcome.error, outcome.is_success) == (204, None, True)
    (request,) = receiver.requests
    assert request.path == "/hook/%20?a=b"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == "dlv_x"
    assert Webhook(SECRET).verify(request.body, request.headers) == json.loads(BODY)
    assert set(request.headers) == {
        "host", "content-type", "content-length", "user-agent",
        "webhook-id", "webhook-timestamp", "webhook-signature",
    }  # fmt: skip


def test_an_ipv6_address_is_called_too() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            # Where the kernel has none, that must be what is told.
            outcome = sender().send(attempt_at("http://[::1]:8080/"))
            assert outcome.error is not None
            assert outcome.error.startswith("no connection")
            return
        probe.listen()
        port = probe.getsockname()[1]
        heard: list[bytes] = []

        def answer() -> None:
            connection, _ = probe.accept()
            with connection:
                heard.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert sender().send(attempt_at(f"http://[::1]:{port}/")).status == 200
        thread.join()
    assert f"host: [::1]:{port}\r\n".encode() in heard[0].lower()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, status: int) -> None:
    with receiving() as elsewhere:
        target = f"http://127.0.0.1:{elsewhere.port}/"
        receiver.answer = with_status(status, Location=target)
        outcome = sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/"))
        assert (outcome.status, outcome.is_success) == (status, False)
        assert elsewhere.requests == []


@pytest.mark.parametrize("status", [200, 299, 304, 400, 410, 500])
def test_a_2xx_alone_is_a_success(receiver: Receiver, status: int) -> None:
    receiver.answer = with_status(status)
    outcome = sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/"))
    assert outcome.is_success is (200 <= status < 300)


def test_without_the_setting_nothing_on_this_machine_is_called(receiver: Receiver) -> None:
    hosts = ["127.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "localhost", "0.0.0.0", "127.0.0.2"]
    for host in hosts:
        for scheme in ("http", "https"):
            outcome = sender(allowed=()).send(attempt_at(f"{scheme}://{host}:{receiver.port}/"))
            assert outcome.status is None
            assert outcome.error is not None
            assert "not public" in outcome.error
    assert receiver.requests == []


def test_a_name_that_changes_its_mind_is_looked_at_each_time(receiver: Receiver) -> None:
    """DNS rebinding: public when the webhook was made, the loopback when it is called."""
    asked: list[str] = []

    def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["203.0.114.7"] if len(asked) == 1 else ["127.0.0.1"]

    url = f"https://hooks.example:{receiver.port}/"
    from jobs.webhook_targets import addresses_of, parse_target

    assert addresses_of(parse_target(url), resolver=rebinding)
    outcome = sender(allowed=(), resolver=rebinding).send(attempt_at(url))
    assert outcome.error is not None
    assert "not public" in outcome.error
    assert asked == ["hooks.example"] * 2  # and once a call: what was checked is what is called
    assert receiver.requests == []


def test_what_was_resolved_is_what_is_connected_to(receiver: Receiver) -> None:
    """The system's resolver, which knows no such name, is not asked a second time."""
    outcome = sender(resolver=lambda host, port: ["127.0.0.1"]).send(
        attempt_at(f"http://hooks.invalid:{receiver.port}/")
    )
    assert outcome.status == 204
    assert receiver.requests[0].headers["host"] == f"hooks.invalid:{receiver.port}"


def test_the_next_address_is_tried(receiver: Receiver) -> None:
    addresses = ["127.0.0.9", "127.0.0.1"]  # nobody listens on the first
    outcome = sender(resolver=lambda host, port: addresses).send(
        attempt_at(f"http://hooks.invalid:{receiver.port}/")
    )
    assert outcome.status == 204


@pytest.mark.parametrize("name", ["hooks.example", "other.example"])
def test_tls_holds_the_certificate_against_the_name(tmp_path: Path, name: str) -> None:
    certificate = self_signed(tmp_path / "tls.pem", name)
    trusting = ssl.create_default_context(cafile=str(certificate))
    with receiving(certificate) as receiver:
        outcome = sender(resolver=lambda host, port: ["127.0.0.1"], tls=trusting).send(
            attempt_at(f"https://hooks.example:{receiver.port}/")
        )
        assert receiver.server_names == ["hooks.example"]
        if name == "hooks.example":
            assert outcome.status == 204
            assert receiver.requests[0].headers["host"] == f"hooks.example:{receiver.port}"
        else:
            assert outcome.error is not None
            assert "Hostname mismatch" in outcome.error
            assert receiver.requests == []


def test_a_certificate_of_nobody_is_not_trusted(tmp_path: Path) -> None:
    with receiving(self_signed(tmp_path / "tls.pem", "hooks.example")) as receiver:
        outcome = sender(resolver=lambda host, port: ["127.0.0.1"]).send(
            attempt_at(f"https://hooks.example:{receiver.port}/")
        )
    assert outcome.error is not None
    assert "certificate verify failed" in outcome.error
    assert receiver.requests == []


def test_no_proxy_of_the_environment_is_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/")).status == 204


def test_an_endless_answer_is_left(receiver: Receiver) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while True:  # until the other side leaves, which is an error here
            handler.wfile.write(b"x" * 65536)
            sent.append(65536)

    receiver.answer = endless
    assert sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/")).status == 200
    assert sum(sent) < 100 * MAX_ANSWER_BYTES + (1 << 24)  # what lies in the sockets


def test_a_body_that_never_comes_does_not_matter(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.webhook_sender.ANSWER_SECONDS", 0.1)
    done = threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.flush()
        done.wait(30)

    receiver.answer = silent
    assert sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/")).status == 200
    done.set()


def test_one_who_drips_is_cut_off(receiver: Receiver) -> None:
    """Each byte comes within any timeout of one read; the whole attempt has its own."""
    done = threading.Event()

    def drips(handler: BaseHTTPRequestHandler) -> None:
        while not done.is_set():
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.05)

    receiver.answer = drips
    outcome = sender(timeout_seconds=0.5).send(attempt_at(f"http://127.0.0.1:{receiver.port}/"))
    done.set()
    assert outcome.error == "no answer within 0.5 seconds"


def test_a_resolver_that_hangs_is_not_waited_for() -> None:
    hangs, done = threading.Event(), threading.Event()

    def hanging(host: str, port: int) -> Sequence[str]:
        hangs.set()
        done.wait(30)
        return []

    outcome = sender(timeout_seconds=0.2, resolver=hanging).send(attempt_at("https://x.example/"))
    assert outcome.error == "no answer within 0.2 seconds"
    assert hangs.wait(30)  # a busy machine may only now have begun to ask
    done.set()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "the connection broke"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "the connection broke"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "the connection broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "the connection broke"),
    ],
)
def test_what_is_no_http_is_told(receiver: Receiver, said: bytes, words: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(said)
        handler.close_connection = True

    receiver.answer = answer
    outcome = sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/"))
    assert outcome.status is None
    assert outcome.error is not None
    assert outcome.error.startswith(words)
    assert len(outcome.error) <= 300


def test_nobody_at_home_is_told() -> None:
    outcome = sender().send(attempt_at(f"http://127.0.0.1:{free_port()}/"))
    assert outcome.error is not None
    assert outcome.error.startswith("no connection")
    unknown = sender(resolver=lambda host, port: []).send(attempt_at("https://x.example/"))
    assert unknown.error == "The host x.example does not resolve to an address."


def test_a_url_that_was_stored_by_a_laxer_version_is_not_called() -> None:
    outcome = sender().send(attempt_at("https://u:p@127.0.0.1/"))
    assert outcome.error is not None
    assert "user name" in outcome.error


def test_no_thread_is_left_behind(receiver: Receiver) -> None:
    before = threading.active_count()
    for _ in range(3):
        sender().send(attempt_at(f"http://127.0.0.1:{receiver.port}/"))
    wait_until(lambda: threading.active_count() <= before + 1, "no thread is left")
