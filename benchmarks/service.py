"""The service under load, against what the machine can do at best. One function a part; `--only`
chooses. The last line of standard output is one JSON object with the figures of all parts.

`transfer`: a model of 2 GB goes up as a raw body and comes down again.
    upload_ratio            seconds to copy the file while hashing it, over those until the API had
                            received, hashed and written the body (wanted: at least 0.6)
    upload_whole_ratio      the same over the whole answer, inspection and storing included
    download_ratio          nginx's seconds for the same file, over the API's (at least 0.25)
    download_ratio_accel    the same over nginx's in front of the API, by X-Accel-Redirect (0.9)
    api_rss_growth_mb       the most that the API's memory grew meanwhile (below 150)
    meanwhile_p99_ms        of small requests that another client made all the while

`submit`: benchmarks/service_submit.py, on SQLite and PostgreSQL, named in front
    submit_p50_ms, _p99_ms  of PostgreSQL's: 50 clients at once
    list_p99_ratio          the largest of both: listing and getting among 1,000,000 jobs over few

`events`: benchmarks/service_events.py; `sse_` with Redis and PostgreSQL, `sse_embedded_` without.
    sse_p99_ms              how late an event reaches the last of 300 watchers
    first_event_s           from the submission to the first event of the job's process
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import tarfile
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from benchmarks import service_events, service_submit
from jobs import store
from jobs.artifacts import open_store
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT
from jobs.states import JobState
from tests.builders import bert_config
from tests.services import free_port, nginx_server

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / ".venv" / "api" / "bin" / "python"
BLOCK = 1 << 20
Figures = dict[str, float]


# --- the service as a process ---------------------------------------------------------------


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    port: int
    data_dir: Path
    log: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.data_dir / 'api_key').read_text().strip()}"}

    def client(self, port: int | None = None) -> httpx.Client:
        url = f"http://127.0.0.1:{port or self.port}"
        return httpx.Client(base_url=url, headers=self.headers, timeout=600, trust_env=False)

    def logged(self, event: str) -> list[dict[str, object]]:
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{")
        return [line for line in lines if line["event"] == event]


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[Service]:
    """`python -m api` on a free port, with everything in `folder`."""
    data_dir, log = folder / "data", folder / "api.log"
    variables = {
        "WIDTHWISE_DATA_DIR": str(data_dir),
        "WIDTHWISE_PORT": "0",
        "WIDTHWISE_LOG_FORMAT": "json",
        "WIDTHWISE_RATE_LIMIT_PER_MINUTE": "0",
        **settings,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [API, "-m", "api"],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=output,
        )
    try:
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            if process.poll() is not None:
                raise SystemExit(f"the API did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield Service(process, int(found[1]), data_dir, log, variables)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# --- transfer -------------------------------------------------------------------------------


def transfer(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory(prefix="widthwise-transfer-", dir=args.dir) as name:
        folder = Path(name)
        upload = _large_model(folder, size_bytes=int(args.gb * 1e9))
        print(f"{upload.stat().st_size / 1e9:.2f} GB as {upload.name}", flush=True)
        with serving(folder, WIDTHWISE_ACCEL_PREFIX="") as service, service.client() as client:
            client.get("/v1/me").raise_for_status()
            with _memory_watched(service.process.pid) as grown, _asking(service) as waits:
                figures = _uploads(service, upload, folder, args.rounds)
                _send_resumable(service, client, upload)
                figures |= _downloads(service, upload, folder, args.rounds)
            figures["api_rss_growth_mb"] = round(grown() / 1e6, 1)
            figures["meanwhile_p99_ms"] = round(1000 * _percentile(waits, 0.99), 1)
    return figures


def _uploads(service: Service, upload: Path, folder: Path, rounds: int) -> Figures:
    copies, received, whole = [], [], []
    for round_ in range(rounds):
        copies.append(_timed(lambda: _copy_hashing(upload, folder / "copy")))
        (folder / "copy").unlink()
        path = f"/v1/models?filename={upload.name}&name=round-{round_}"
        whole.append(_timed(partial(_send, service, path, upload)))
        line = service.logged("upload.received")[-1]
        assert line["bytes"] == upload.stat().st_size
        received.append(float(str(line["ms"])) / 1000)
        print(
            f"copied in {copies[-1]:.2f} s, received in {received[-1]:.2f} s, "
            f"inspected and stored after {whole[-1]:.2f} s",
            flush=True,
        )
    return {
        "upload_ratio": _ratio(copies, received),
        "upload_whole_ratio": _ratio(copies, whole),
        "upload_mb_per_s": round(upload.stat().st_size / statistics.median(received) / 1e6),
    }


def _downloads(service: Service, upload: Path, folder: Path, rounds: int) -> Figures:
    """From the API, from nginx, and from nginx in front of another process of the API."""
    path = _published(service, upload)
    port, objects = free_port(), service.data_dir / "objects"
    second = service.variables | {"WIDTHWISE_ACCEL_PREFIX": "/objects/"}
    (folder / "second").mkdir()
    with serving(folder / "second", **second) as behind:
        example = (ROOT / "docs" / "uploads-and-downloads.md").read_text()
        (block,) = re.findall(r"```nginx\n(.*?)```", example, re.DOTALL)
        block = block.replace("/var/lib/widthwise/objects", str(objects))
        block = block.replace("127.0.0.1:8000", f"127.0.0.1:{behind.port}")
        block += f"location /plain/ {{ alias {upload.parent}/; }}"
        headers = service.headers
        ways: dict[str, Callable[[], int]] = {}
        with nginx_server(block, port=port):
            ways["nginx"] = lambda: _receive(port, f"/plain/{upload.name}", {})
            ways["api"] = lambda: _receive(service.port, path, headers)
            ways["accel"] = lambda: _receive(port, path, headers)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, receive in ways.items():
                    at = time.perf_counter()
                    assert receive() == upload.stat().st_size
                    seconds[way].append(time.perf_counter() - at)
                told = ", ".join(f"{way} {each[-1]:.2f} s" for way, each in seconds.items())
                print(f"downloaded: {told}", flush=True)
    return {
        "download_ratio": _ratio(seconds["nginx"], seconds["api"]),
        "download_ratio_accel": _ratio(seconds["nginx"], seconds["accel"]),
        "download_mb_per_s": round(upload.stat().st_size / statistics.median(seconds["api"]) / 1e6),
    }


def _large_model(folder: Path, *, size_bytes: int) -> Path:
    """A BERT of about this size in a .tar, its weights the same random block again and again."""
    hidden, ffn, vocabulary = 1024, 4096, 30522
    tables = {"word": vocabulary, "position": 512, "token_type": 2}
    shapes: dict[str, tuple[int, ...]] = {
        f"bert.embeddings.{name}_embeddings.weight": (rows, hidden) for name, rows in tables.items()
    }
    shapes |= _norm("bert.embeddings.LayerNorm", hidden)
    one_layer = 4 * (4 * hidden * hidden + 2 * hidden * ffn)
    layers = max(1, (size_bytes - 4 * vocabulary * hidden) // one_layer)
    for number in range(layers):
        layer = f"bert.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", ffn, hidden)
        shapes |= _linear(f"{layer}.output.dense", hidden, ffn)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    shapes |= _linear("bert.pooler.dense", hidden, hidden) | _linear("classifier", 2, hidden)

    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    block = np.random.default_rng(0).normal(size=4 * BLOCK, scale=0.02).astype("<f4").tobytes()
    model = folder / "model"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        while at > 0:
            at -= file.write(block[:at])
    config = bert_config(
        vocab_size=vocabulary, layers=layers, heads=16, hidden=hidden, ffn=ffn, max_positions=512
    )
    (model / "config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(vocabulary - len(words))]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    packed = folder / "model.tar"
    with tarfile.open(packed, "w") as tar:
        for path in sorted(model.iterdir()):
            tar.add(path, arcname=path.name)
            path.unlink()
    return packed


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _published(service: Service, file: Path) -> str:
    """The file as an artifact, as a run would have stored it; the path of its content."""
    database = Database(f"sqlite:///{service.data_dir / 'widthwise.db'}")
    key = "jobs/benchmark/1/w1/model.tar"
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    open_store((service.data_dir / "objects").as_uri()).put_file(key, file)
    with database.transaction() as session:
        common = {"project_id": DEFAULT_PROJECT, "size_bytes": 0, "uploads": [], "files": []}
        store.add_model(session, id="mdl_benchmark", name="m", info={}, **common)
        store.add_dataset(session, id="dst_benchmark", name="d", profile={}, **common)
        job = store.create_job(
            session,
            project_id=DEFAULT_PROJECT,
            name="benchmark",
            model_id="mdl_benchmark",
            dataset_id="dst_benchmark",
            spec={},
        )
        claim = store.claim_job(session, job.id, worker="w", lease_seconds=600, max_runs=3)
        assert claim is not None
        artifact = store.add_artifact(
            session,
            claim,
            path="w1/model.tar",
            key=key,
            size_bytes=file.stat().st_size,
            sha256=sha256,
            media_type="application/x-tar",
        )
        store.finish_job(session, claim, JobState.SUCCEEDED, report={})
    database.close()
    return f"/v1/artifacts/{artifact.id}/content"


def _copy_hashing(source: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while block := read.read(BLOCK):
            digest.update(block)
            written.write(block)


def _connected(port: int, method: str, path: str, headers: dict[str, str]) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=600)
    lines = [f"{method} {path} HTTP/1.1", "Host: benchmark", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def _send(
    service: Service,
    path: str,
    file: Path,
    method: str = "POST",
    expected: int = 201,
    more: dict[str, str] | None = None,
) -> None:
    """With sendfile, so that the client takes as little of the machine as it can."""
    headers = service.headers | {"Content-Length": str(file.stat().st_size)} | (more or {})
    with _connected(service.port, method, path, headers) as connection, file.open("rb") as opened:
        connection.sendfile(opened)
        answer = b""
        while block := connection.recv(BLOCK):
            answer += block
    if not answer.startswith(f"HTTP/1.1 {expected} ".encode()):
        raise SystemExit(f"the upload was refused: {answer[:2000].decode(errors='replace')}")


def _send_resumable(service: Service, client: httpx.Client, file: Path) -> None:
    """By tus, in a single PATCH; what it takes of memory counts as well."""
    encoded = {"kind": b"model", "filename": file.name.encode()}
    metadata = ",".join(f"{key} {b64encode(value).decode()}" for key, value in encoded.items())
    tus = {"Tus-Resumable": "1.0.0"}
    size = str(file.stat().st_size)
    begun = client.post(
        "/v1/uploads", headers=tus | {"Upload-Length": size, "Upload-Metadata": metadata}
    )
    path = begun.headers["location"]
    more = {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    seconds = _timed(lambda: _send(service, path, file, "PATCH", 204, tus | more))
    print(f"by tus, inspected and stored after {seconds:.2f} s", flush=True)


def _receive(port: int, path: str, headers: dict[str, str]) -> int:
    """Bytes of the body; they are looked at no further, so that the client is not what limits."""
    buffer = memoryview(bytearray(BLOCK))
    with _connected(port, "GET", path, headers) as connection:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(BLOCK)
        assert head.startswith(b"HTTP/1.1 200 "), head[:500]
        received = len(head) - head.index(b"\r\n\r\n") - 4
        while count := connection.recv_into(buffer):
            received += count
    return received


@contextmanager
def _memory_watched(pid: int) -> Iterator[Callable[[], int]]:
    """By how many bytes the process grew at most since now, as far as is seen 50 times a second."""
    start, most, ended = _resident(pid), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], _resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most[0] - start
    finally:
        ended.set()
        watcher.join()


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _asking(service: Service) -> Iterator[list[float]]:
    """Seconds of small requests, ten a second, for as long as the block lasts."""
    waits: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with service.client() as client:
            while not ended.wait(0.1):
                waits.append(_timed(lambda: client.get("/v1/me").raise_for_status()))

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield waits
    finally:
        ended.set()
        asker.join()


# --- figures --------------------------------------------------------------------------------


def _timed(call: Callable[[], object]) -> float:
    at = time.perf_counter()
    call()
    return time.perf_counter() - at


def _ratio(reference: list[float], ours: list[float]) -> float:
    """Of medians: other programs of the machine disturb single rounds."""
    return round(statistics.median(reference) / statistics.median(ours), 3)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def submit(args: argparse.Namespace) -> Figures:
    """Of both databases; figures without a database's name are PostgreSQL's, or the worse."""
    figures: Figures = {}
    for database in ("sqlite", "postgresql"):
        figures |= service_submit.measure(
            database, jobs=args.jobs, rows=args.rows, rounds=args.questions
        )
    for name in ("submit_p50_ms", "submit_p99_ms"):
        figures[name] = figures[f"postgresql_{name}"]
    name = "list_p99_ratio"
    figures[name] = max(figures[f"{database}_{name}"] for database in ("sqlite", "postgresql"))
    return figures


def events(args: argparse.Namespace) -> Figures:
    return service_events.measure(watchers=service_events.WATCHERS, events=100, times=5)


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "transfer": transfer,
    "submit": submit,
    "events": events,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument(
        "--dir", type=Path, help="where large files go; default: for temporary ones"
    )
    parser.add_argument("--gb", type=float, default=2.0, help="transfer: size of the model")
    parser.add_argument("--rounds", type=int, default=3, help="transfer: repetitions")
    parser.add_argument("--jobs", type=int, default=2000, help="submit: by all clients together")
    parser.add_argument(
        "--rows", type=int, default=service_submit.ROWS, help="submit: jobs in the large database"
    )
    parser.add_argument("--questions", type=int, default=1000, help="submit: of each kind")
    args = parser.parse_args()
    figures: Figures = {}
    for name in args.only or PARTS:
        print(f"== {name}", flush=True)
        figures |= PARTS[name](args)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
