"""A small REST client on the standard library: what the demo and the end-to-end tests speak."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


class ApiError(Exception):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"{status}: {problem.get('detail') or problem.get('title') or problem}")
        self.status = status
        self.problem = problem


@dataclass(frozen=True)
class Download:
    path: Path
    size_bytes: int
    sha256: str


class Client:
    """One connection a request; `url` is the service's address without a path."""

    def __init__(self, url: str, key: str, *, timeout: float = 600) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._key = key
        self._timeout = timeout

    def get(self, path: str, **query: str | int) -> Any:
        if query:
            path += "?" + urllib.parse.urlencode(query)
        return self._call("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        if body is None:
            return self._call("POST", path)
        content = json.dumps(body).encode()
        return self._call("POST", path, content, {"Content-Type": "application/json"})

    def upload(self, path: str, file: Path, *, name: str) -> Any:
        """Streams one file as the request's body."""
        query = urllib.parse.urlencode({"filename": file.name, "name": name})
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(file.stat().st_size),
        }
        with file.open("rb") as body:
            return self._call(
                "POST", f"{path}?{query}", iter(lambda: body.read(_BLOCK), b""), headers
            )

    def download(self, path: str, target: Path) -> Download:
        """Streams into `target`; ValueError when the bytes are not those that the headers name.

        Both the strong ETag and Repr-Digest (RFC 9530) carry the SHA-256 of the content.
        """
        connection, response = self._open("GET", path, None, {})
        digest, size = hashlib.sha256(), 0
        try:
            with target.open("wb") as file:
                while block := response.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
            etag = response.headers.get("ETag", "")
            repr_digest = response.headers.get("Repr-Digest", "")
        finally:
            connection.close()
        if etag != f'"{digest.hexdigest()}"':
            raise ValueError(f"the download has SHA-256 {digest.hexdigest()}, its ETag says {etag}")
        expected = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        if repr_digest != expected:
            raise ValueError(f"Repr-Digest says {repr_digest!r}, the bytes give {expected!r}")
        return Download(path=target, size_bytes=size, sha256=digest.hexdigest())

    def follow(
        self, job_id: str, *, alive: Callable[[], None] = lambda: None, pause: float = 0.5
    ) -> Iterator[dict[str, Any]]:
        """The job's events as they come, until it ends. `alive` may raise between two polls."""
        after = 0
        while True:
            alive()
            page = self.get(f"/v1/jobs/{job_id}/events", after=after, limit=100)
            after = page["next"]
            yield from page["items"]
            if page["ended"]:
                return
            if not page["items"]:
                time.sleep(pause)

    def _call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        connection, response = self._open(method, path, body, headers or {})
        try:
            content = response.read()
        finally:
            connection.close()
        return json.loads(content) if content else None

    def _open(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A response with a 2xx status, its body not read yet. ApiError for any other."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(
                method, path, body, {"Authorization": f"Bearer {self._key}", **headers}
            )
            response = connection.getresponse()
            if response.status >= 300:
                content = response.read()
                try:
                    problem = json.loads(content)
                except ValueError:
                    problem = {"detail": content.decode(errors="replace")[:500]}
                raise ApiError(response.status, problem)
        except BaseException:
            connection.close()
            raise
        return connection, response
