from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.settings import Settings


def test_everything_local_lies_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", "some where")
    settings = Settings()
    assert settings.data_dir == tmp_path / "some where"
    assert settings.database_url == f"sqlite:///{tmp_path}/some where/widthwise.db"
    assert settings.store_url == f"file://{tmp_path}/some%20where/objects"
    assert settings.work_dir == tmp_path / "some where" / "work"


def test_variables_override_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTHWISE_WORKER_SLOTS", "3")
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", "")  # as compose files leave what is unset
    assert Settings().worker_slots == 3
    assert Settings().database_url.startswith("sqlite:")
    monkeypatch.setenv("WIDTHWISE_WORKER_SLOTS", "-1")
    with pytest.raises(ValidationError):
        Settings()


def test_settings_are_frozen_and_show_no_passwords() -> None:
    settings = Settings(
        database_url="postgresql+psycopg://u:hush@h/d", broker_url="redis://:hush@h/0"
    )
    assert "hush" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_origins_are_a_list_of_what_browsers_send(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().cors_origins == ()
    monkeypatch.setenv("WIDTHWISE_CORS_ORIGINS", "https://portal.example, http://[::1]:3000")
    assert Settings().cors_origins == ("https://portal.example", "http://[::1]:3000")
    for wrong in ("portal.example", "https://portal.example/", "https://*.example", "null",
                  "https://Portal.example", "file://x"):  # fmt: skip
        monkeypatch.setenv("WIDTHWISE_CORS_ORIGINS", wrong)
        with pytest.raises(ValidationError, match="is no origin"):
            Settings()
