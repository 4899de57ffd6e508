from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import inputs

SETTINGS: dict[str, Any] = {"teacher_epochs": 5, "max_steps": None, "data": Path("data")}


def test_a_folder_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    inputs.keep_settings(folder, SETTINGS)
    kept = (folder / inputs.SETTINGS).read_text()
    inputs.keep_settings(folder, dict(reversed(SETTINGS.items())))
    inputs.keep_settings(folder, SETTINGS | {"data": Path.cwd() / "data"})
    assert [path.name for path in folder.iterdir()] == [inputs.SETTINGS]
    assert (folder / inputs.SETTINGS).read_text() == kept


@pytest.mark.parametrize(
    "other", [{"teacher_epochs": 6}, {"max_steps": 2}, {"data": Path("elsewhere/data")}]
)
def test_a_folder_of_other_settings_is_refused_and_stays(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    inputs.keep_settings(tmp_path, SETTINGS)
    kept = (tmp_path / inputs.SETTINGS).read_text()
    with pytest.raises(SystemExit, match=r'holds results of .*"teacher_epochs": 5'):
        inputs.keep_settings(tmp_path, SETTINGS | other)
    assert (tmp_path / inputs.SETTINGS).read_text() == kept


def test_a_file_is_never_there_in_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.json"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.replace", killed)
        inputs.write_whole(path, "[1, 0]")
    assert not path.exists()
    inputs.write_whole(path, "[0]")
    assert path.read_text() == "[0]"
    assert list(tmp_path.iterdir()) == [path]
