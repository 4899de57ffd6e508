"""Liveness and readiness."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.api.conftest import Service, assert_problem, serving


def test_a_whole_service_is_ready(service: Service) -> None:
    assert service.client.get("/healthz").json() == {"status": "ok"}
    ready = service.client.get("/readyz").json()
    assert ready == {
        "status": "ok",
        "checks": {"database": "ok", "store": "ok", "broker": "ok"},
    }


def test_readiness_leaves_nothing_in_the_store(service: Service) -> None:
    service.client.get("/readyz")
    assert service.services.store.keys("probes/") == []


def test_a_database_without_the_newest_schema_is_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0003'")
        problem = assert_problem(service.client.get("/readyz"), 503, "not-ready")
        assert problem["checks"]["database"] == "not migrated; run python -m jobs.migrate"
        assert problem["checks"]["store"] == "ok"
        assert service.client.get("/healthz").status_code == 200
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM alembic_version")
        assert_problem(service.client.get("/readyz"), 503, "not-ready")


def test_a_database_of_a_newer_version_is_ready(tmp_path: Path) -> None:
    """While an upgrade is under way, the API of the version before goes on answering."""
    with serving(tmp_path / "data") as service:
        with service.services.database.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'newer'")
        assert service.client.get("/readyz").json()["checks"]["database"] == "ok"


def test_a_newer_schema_is_as_good_as_it_says(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        engine = service.services.database.engine
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'newer'")
            connection.exec_driver_sql("INSERT INTO supported_revisions VALUES ('newer')")
        assert service.client.get("/readyz").status_code == 200
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM supported_revisions WHERE revision < 'newer'")
        problem = assert_problem(service.client.get("/readyz"), 503, "not-ready")
        assert "a newer version" in problem["checks"]["database"]


def test_a_store_that_cannot_be_written_is_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        objects = service.settings.data_dir / "objects"
        shutil.rmtree(objects)
        objects.write_text("a file where the folder was")
        answer = service.client.get("/readyz")
        problem = assert_problem(answer, 503, "not-ready")
        assert problem["checks"]["store"].startswith("unreachable")
        assert answer.headers["retry-after"] == "5"
        assert str(tmp_path) not in answer.text
