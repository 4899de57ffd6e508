from __future__ import annotations

from pathlib import Path

import pytest
import redis
from pydantic import ValidationError
from pydantic_settings import SettingsError
from sqlalchemy import make_url

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


PASSWORD = "p@ss/w:rd %41"  # each of these means something else in a URL


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "database_password",
        "broker_password",
        "s3_access_key_id",
        "s3_secret_access_key",
    ):
        (tmp_path / name).write_text(f"{PASSWORD}\n")
        monkeypatch.setenv(f"WIDTHWISE_{name.upper()}_FILE", str(tmp_path / name))
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", "postgresql+psycopg://widthwise@db:5432/w?a=b")
    monkeypatch.setenv("WIDTHWISE_BROKER_URL", "redis://[::1]:6379/0")
    settings = Settings()
    database = make_url(settings.database_url)
    assert (database.username, database.password) == ("widthwise", PASSWORD)
    assert (database.host, database.port, database.query) == ("db", 5432, {"a": "b"})
    broker = redis.ConnectionPool.from_url(settings.broker_url).connection_kwargs
    assert (broker["host"], broker["port"], broker["password"]) == ("::1", 6379, PASSWORD)
    assert settings.s3_credentials == {"access_key_id": PASSWORD, "secret_access_key": PASSWORD}
    assert "p@ss" not in repr(settings) and "p%40ss" not in repr(settings)


def test_a_secret_file_that_is_no_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("WIDTHWISE_DATABASE_PASSWORD_FILE", str(file))
    with pytest.raises(
        SettingsError, match=f"WIDTHWISE_DATABASE_PASSWORD_FILE: {file} cannot be read"
    ):
        Settings()
    file.write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        Settings()
    file.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings()
    file.write_text("hush")
    monkeypatch.setenv("WIDTHWISE_DATABASE_PASSWORD", "hush")
    with pytest.raises(SettingsError, match="both set"):
        Settings()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"database_password": "hush"}, "no server"),  # SQLite
        ({"broker_password": "hush"}, "no server"),  # a folder
        (
            {"database_url": "postgresql+psycopg://u:hush@h/d", "database_password": "hush"},
            "already",
        ),
        ({"s3_access_key_id": "hush"}, "both or neither"),
        ({"s3_secret_access_key": "hush"}, "both or neither"),
    ],
)
def test_secrets_that_do_not_fit_are_refused_and_not_shown(
    wrong: dict[str, str], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        Settings(**wrong)
    assert "hush" not in str(caught.value)
