from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from compression.tables import read_splits
from compression.teachers import read_checkpoint
from compression.tokenization import encode, load_tokenizer
from jobs.errors import UploadRejected
from jobs.inspection import ModelInspection, inspect_dataset_upload, inspect_model_upload
from jobs.settings import Settings
from tests.builders import (
    FAMILIES,
    tiny_bert,
    tiny_dataset,
    tiny_family,
    tiny_paddlenlp,
    torch_zip,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", sandbox_seconds=60)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _tar(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=folder.name)
    return archive


def _model(upload: list[Path], tmp_path: Path, settings: Settings) -> ModelInspection:
    return inspect_model_upload(upload, tmp_path / "out", settings)


def _left(tmp_path: Path) -> list[str]:
    """What an inspection left behind beside the inputs."""
    return [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "inspect-"))]


def test_a_model_is_described_and_its_clean_files_are_kept(
    tmp_path: Path, settings: Settings
) -> None:
    folder = tiny_bert(tmp_path / "in", labels=("bad", "good"))
    (folder / "README.md").write_text("not needed")
    found = _model(_files(folder), tmp_path, settings)
    info = found.info
    assert (info.family, info.layers, info.heads, info.hidden) == ("bert", 2, 4, 32)
    assert info.legal_widths == (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    assert (info.num_labels, info.labels, info.layout) == (2, ("bad", "good"), "huggingface")
    assert found.files == ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(found.files)
    assert _left(tmp_path) == ["out"]
    _same_model(folder, tmp_path / "out")


def _same_model(before: Path, after: Path) -> None:
    old, new = read_checkpoint(before), read_checkpoint(after)
    assert new.config == old.config
    assert new.tensors.keys() == old.tensors.keys()
    for name, array in old.tensors.items():
        np.testing.assert_array_equal(new.tensors[name], array)
    texts = ["the good film", "a dull story ."]
    assert encode(load_tokenizer(after), texts, None, 16) == encode(
        load_tokenizer(before), texts, None, 16
    )


def test_an_archive_of_a_folder_is_the_folder(tmp_path: Path, settings: Settings) -> None:
    folder = tiny_bert(tmp_path / "in")
    found = _model([_tar(folder, tmp_path / "model.tar.gz")], tmp_path, settings)
    assert "model.safetensors" in found.files
    _same_model(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pdparams", "bin"])
def test_pickled_weights_become_safetensors(tmp_path: Path, settings: Settings, kind: str) -> None:
    expected = tiny_bert(tmp_path / "expected")
    if kind == "pdparams":
        folder = tiny_paddlenlp(tmp_path / "in")
    else:
        folder = tiny_bert(tmp_path / "in")
        torch_zip(folder / "pytorch_model.bin", dict(load_file(folder / "model.safetensors")))
        (folder / "model.safetensors").unlink()
    found = _model(_files(folder), tmp_path, settings)
    assert not {"model_state.pdparams", "pytorch_model.bin"} & set(found.files)
    assert any("was converted" in warning for warning in found.warnings)
    _same_model(expected, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described(tmp_path: Path, settings: Settings, family: str) -> None:
    layout = "paddlenlp" if family in ("ernie", "tinybert") else "huggingface"
    folder = tiny_family(tmp_path / "in", family, layout=layout, num_labels=3)
    found = _model(_files(folder), tmp_path, settings)
    info = found.info
    assert (info.family, info.layers, info.heads, info.hidden) == (family, 2, 4, 32)
    assert info.legal_widths == (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    assert (info.max_positions, info.num_labels, info.layout) == (64, 3, layout)
    stored = load_file(folder / "model.safetensors")
    assert info.parameters == sum(array.size for array in stored.values())
    assert ("merges.txt" in found.files) == (family == "roberta")
    _same_model(folder, tmp_path / "out")


class _Touches:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.canary}'",)


def test_a_hostile_pickle_is_refused_ran_nothing_and_leaves_nothing(
    tmp_path: Path, settings: Settings
) -> None:
    canary = tmp_path / "canary"
    for build, name in ((tiny_paddlenlp, "model_state.pdparams"), (tiny_bert, "pytorch_model.bin")):
        folder = build(tmp_path / name)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps({"w": _Touches(canary)}))
        pickle.loads((folder / name).read_bytes())  # the control
        assert canary.exists()
        canary.unlink()
        with pytest.raises(UploadRejected) as caught:
            _model(_files(folder), tmp_path, settings)
        assert (caught.value.code, caught.value.pointer) == ("unsafe-pickle", name)
        assert not canary.exists()
        assert _left(tmp_path) == []


def _lie(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [1 << 20, 1 << 20]
    edited = json.dumps(header).encode()
    path.write_bytes(len(edited).to_bytes(8, "little") + edited + raw[8 + length :])


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _huge_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(num_hidden_layers=10**9, hidden_size=10**9)
    (folder / "config.json").write_text(json.dumps(config))


def _wider_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(intermediate_size=128)
    (folder / "config.json").write_text(json.dumps(config))


def _fast_tokenizer(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The folder's tokenizer as a tokenizer.json that was edited by hand."""

    def write(folder: Path) -> None:
        tokenizer = json.loads(load_tokenizer(folder).to_str())
        edit(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return write


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_lie, "which do not hold F32"),
        (_truncate, "cut short"),
        (_huge_config, "hidden_size is 1000000000"),
        (_wider_config, "mis-shaped parameters"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda folder: (folder / "vocab.txt").unlink(), "neither tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("["), "not JSON"),
        (
            _fast_tokenizer(
                lambda t: t["post_processor"]["special_tokens"]["[CLS]"].update(ids=[10**6])
            ),
            "token id 1000000, but the model embeds only 51",
        ),
        (
            _fast_tokenizer(
                lambda t: t["post_processor"]["single"][0]["SpecialToken"].update(type_id=9)
            ),
            "token type 9, but the model has only 2",
        ),
        (
            _fast_tokenizer(lambda t: t["post_processor"]["pair"][3]["Sequence"].update(type_id=2)),
            "token type 2, but the model has only 2",
        ),
        (_fast_tokenizer(lambda t: t["model"].update(unk_token="[NONE]")), "fails on a plain"),
    ],
)
def test_models_that_do_not_hold_together_are_refused(
    tmp_path: Path, settings: Settings, edit: Callable[[Path], object], message: str
) -> None:
    folder = tiny_bert(tmp_path / "in")
    edit(folder)
    with pytest.raises(UploadRejected, match=message) as caught:
        _model(_files(folder), tmp_path, settings)
    assert caught.value.code in (
        "invalid-model", "damaged-weights", "invalid-json", "invalid-tokenizer",
    )  # fmt: skip
    assert _left(tmp_path) == []


def test_hostile_archives_are_refused_and_leave_nothing(tmp_path: Path, settings: Settings) -> None:
    escape = tmp_path / "escape.zip"
    with zipfile.ZipFile(escape, "w") as file:
        file.writestr("../../escaped", "x")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.safetensors", bytes(2**24))
    for archive, code in ((escape, "unsafe-archive"), (bomb, "archive-bomb")):
        with pytest.raises(UploadRejected) as caught:
            _model([archive], tmp_path, settings)
        assert caught.value.code == code
        with pytest.raises(UploadRejected) as caught:
            inspect_dataset_upload([archive], tmp_path / "out", settings)
        assert caught.value.code == code
    assert _left(tmp_path) == []
    assert not list(tmp_path.parent.rglob("escaped"))


def test_uploads_that_are_no_uploads(tmp_path: Path, settings: Settings) -> None:
    folder = tiny_bert(tmp_path / "in")
    packed = _tar(folder, tmp_path / "model.tgz")
    shutil.copytree(folder, tmp_path / "again")
    for upload, code in (
        ([], "empty-upload"),
        ([packed, folder / "config.json"], "mixed-upload"),
        ([folder / "config.json", tmp_path / "again" / "config.json"], "mixed-upload"),
    ):
        with pytest.raises(UploadRejected) as caught:
            _model(upload, tmp_path, settings)
        assert caught.value.code == code
    assert _left(tmp_path) == []


def test_a_dataset_is_profiled_and_cleaned(tmp_path: Path, settings: Settings) -> None:
    folder = tiny_dataset(tmp_path / "in", rows={"train": 40, "dev": 10})
    found = inspect_dataset_upload(_files(folder), tmp_path / "out", settings)
    assert {name: split.rows for name, split in found.profile.splits.items()} == {
        "train": 40, "dev": 10,
    }  # fmt: skip
    assert (found.profile.text, found.profile.label) == ("text", "label")
    assert found.files == ("dev.jsonl", "train.jsonl")
    assert read_splits(tmp_path / "out") == read_splits(folder)
    packed = inspect_dataset_upload(
        [_tar(folder, tmp_path / "data.tar.gz")], tmp_path / "out2", settings
    )
    assert packed.profile == found.profile


def test_lists_and_scores_are_kept_for_the_tasks_that_want_them(
    tmp_path: Path, settings: Settings
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = ['{"text": "一", "topics": ["a", "乙"]}', '{"text": "二", "topics": []}']
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    listed = inspect_dataset_upload(_files(folder), tmp_path / "out", settings)
    assert listed.profile.splits["train"].columns[1].kind == "list"
    assert read_splits(tmp_path / "out") == read_splits(folder)
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text("text,score\na,0.5\nb,1.25\n")
    scored = inspect_dataset_upload(_files(folder), tmp_path / "out2", settings)
    assert scored.profile.splits["train"].columns[1].kind == "number"


def test_what_a_head_is_for_is_told(tmp_path: Path, settings: Settings) -> None:
    assert _model(_files(tiny_bert(tmp_path / "in")), tmp_path, settings).info.head_task is None
    shutil.rmtree(tmp_path / "out")
    one = tiny_bert(tmp_path / "one", num_labels=1)
    assert _model(_files(one), tmp_path, settings).info.head_task == "regression"
    shutil.rmtree(tmp_path / "out")
    several = tiny_bert(tmp_path / "several", num_labels=3)
    config = json.loads((several / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (several / "config.json").write_text(json.dumps(config))
    assert _model(_files(several), tmp_path, settings).info.head_task == "multi_label"


def test_broken_rows_come_back_with_their_lines(tmp_path: Path, settings: Settings) -> None:
    folder = tiny_dataset(tmp_path / "in", rows={"train": 40, "dev": 10})
    lines = (folder / "train.tsv").read_text().splitlines()
    lines[6] += "\tone cell too many"
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UploadRejected) as caught:
        inspect_dataset_upload(_files(folder), tmp_path / "out", settings)
    assert caught.value.code == "invalid-dataset"
    assert [(row.file, row.line) for row in caught.value.rows] == [("train.tsv", 7)]
    assert _left(tmp_path) == []


def test_limits_come_from_the_settings(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "in")
    settings = Settings(data_dir=tmp_path / "data", sandbox_memory_bytes=2**26)
    with pytest.raises(UploadRejected) as caught:
        _model(_files(folder), tmp_path, settings)
    assert caught.value.code in ("inspection-failed", "inspection-too-large")
    assert _left(tmp_path) == []


def test_by_hand(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "in")
    command = [sys.executable, "-m", "jobs.inspection", "model", str(folder)]
    good = subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, capture_output=True)
    assert good.returncode == 0
    assert json.loads(good.stdout)["info"]["layers"] == 2
    (folder / "model.safetensors").unlink()
    bad = subprocess.run([*command, str(tmp_path / "out2")], cwd=ROOT, capture_output=True)
    assert bad.returncode == 1
    assert json.loads(bad.stderr)["code"] == "invalid-model"
