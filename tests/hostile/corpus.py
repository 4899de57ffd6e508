"""What the hostile files have in common: how one is named, made and uploaded.

Each is made by code when its test runs, around a good model or dataset, so that the one
thing that is wrong with it is what it is refused for. `tests/hostile/test_corpus.py` uploads
them all through a running API.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.builders import tiny_bert, tiny_paddlenlp

Content = bytes | Callable[[], Iterator[bytes]]  # a stream where it is too large to hold
Files = dict[str, Content]
# What takes megabytes is made when it is needed.
Made = bytes | Callable[[], bytes]


@dataclass(frozen=True)
class Place:
    """A folder to build in, and what a file that runs code would do."""

    folder: Path
    canary: Path
    port: int

    @property
    def command(self) -> str:
        """A shell's: leaves a file, with the environment in it, and knocks at a socket."""
        script = f"env > {self.canary}; echo x > /dev/tcp/127.0.0.1/{self.port}"
        return f"bash -c '{script}'"


@dataclass(frozen=True)
class Hostile:
    """One hostile upload: to `/v1/<kind>`, refused with the problem `type`.

    Several files go as a form; one goes as a raw body. `bites`: what an unpickler that
    nobody guards would load of it, to show that the payload works.
    """

    kind: str
    type: str
    files: Callable[[Place], Files]
    bites: Callable[[Place], bytes] | None = None


Corpus = Mapping[str, Hostile]


def model(place: Place, changes: Mapping[str, Content | None]) -> Files:
    """A good model's files in Hugging Face's layout, some of them changed; None leaves one out."""
    return _with(tiny_bert(place.folder / "model"), changes)


def paddle_model(place: Place, changes: Mapping[str, Content | None]) -> Files:
    """The same in PaddleNLP's layout, whose weights are a pickle."""
    return _with(tiny_paddlenlp(place.folder / "model"), changes)


def _with(folder: Path, changes: Mapping[str, Content | None]) -> Files:
    files: dict[str, Content | None] = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    return {n: content for n, content in (files | dict(changes)).items() if content is not None}


def made(content: Made) -> bytes:
    return content if isinstance(content, bytes) else content()


def noise(size: int) -> bytes:
    """Bytes that do not compress, always the same."""
    return random.Random(size).randbytes(size)
