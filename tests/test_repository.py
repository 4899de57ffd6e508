"""The repository's own promises: compose file, images, locks, import contracts, the Makefile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import redis
import yaml

from jobs.settings import Settings, variable_of
from tests.services import redis_server
from tools.compose_secrets import new_secrets, write
from tools.settings_page import PAGE, render

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("api", "worker", "dev", "demo")
DOCKERFILES = ("api", "worker", "worker-gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_compose_file_is_valid_against_the_compose_schema(compose: dict[str, Any]) -> None:
    schema_path = (
        Path(check_jsonschema.__file__).parent / "builtin_schemas/vendor/compose-spec.json"
    )
    validator = jsonschema.Draft202012Validator(json.loads(schema_path.read_text()))
    assert [error.message for error in validator.iter_errors(compose)] == []
    # The schema is one that can refuse: an unknown field of a service is an error.
    compose["services"]["api"]["imagee"] = "x"
    try:
        assert list(validator.iter_errors(compose))
    finally:
        del compose["services"]["api"]["imagee"]


def test_what_the_compose_file_names_exists(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services.keys() == {
        "redis", "postgres", "storage", "migrations", "api", "scheduler", "worker-cpu", "worker-gpu"
    }  # fmt: skip
    assert compose["secrets"].keys() == new_secrets().keys()
    for name, secret in compose["secrets"].items():
        assert Path(secret["file"]).name == name
    for name, service in services.items():
        for needed in service.get("depends_on", ()):
            assert needed in services, f"{name} depends on {needed}"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith("/") or source in compose["volumes"], f"{name}: {volume}"
        for network in service["networks"]:
            assert network in compose["networks"], f"{name} is on {network}"
        if build := service.get("build"):
            assert (ROOT / build["context"] / build["dockerfile"]).is_file(), name
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert services["worker-gpu"]["environment"]["WIDTHWISE_WORKER_SLOTS"] == "0"
    assert "WIDTHWISE_WORKER_SLOTS" not in services["worker-cpu"]["environment"]
    for name in ("api", "scheduler", "worker-cpu", "worker-gpu"):
        assert services[name]["pids_limit"] > 0
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def _healthcheck_of(service: dict[str, Any]) -> list[str]:
    """The command that tells whether a service is well, of compose file or image."""
    if "healthcheck" in service:
        return list(service["healthcheck"].get("test", []))
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
    (found,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", dockerfile, re.MULTILINE)
    return ["CMD", *json.loads(found)]


def test_no_service_of_the_compose_file_is_root_or_writes_to_its_image(
    compose: dict[str, Any],
) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("no" if name == "migrations" else "unless-stopped")
        assert bool(_healthcheck_of(service)) is (name != "migrations")
        if "build" in service:
            lines = (ROOT / service["build"]["dockerfile"]).read_text().splitlines()
            user = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")][-1]
        else:
            user = service["user"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), name
        # Whatever else it writes to is a volume or memory.
        assert "/tmp" in service["tmpfs"], name


def test_the_services_of_the_compose_file_read_their_secrets(
    compose: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    used = set()
    for name, service in compose["services"].items():
        environment = service.get("environment", {})
        mounted = {f"/run/secrets/{secret}" for secret in service.get("secrets", ())}
        told = json.dumps([environment, service.get("command"), _healthcheck_of(service)])
        assert set(re.findall(r"/run/secrets/\w+", told)) == mounted, name
        used |= mounted
        for variable, value in environment.items():
            secret_file = value.startswith("/run/secrets/") and variable.endswith("_FILE")
            assert secret_file or not re.search("PASSWORD|KEY|SECRET", variable), variable
        if "build" not in service:
            continue
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                known = {variable_of(field) for field in Settings.model_fields}
                assert variable.removesuffix("_FILE") in known or variable.startswith("AWS_")
                patch.setenv(variable, value.replace("/run/secrets", str(tmp_path)))
            settings = Settings()
        password = (tmp_path / "postgres_password").read_text().strip()
        assert f"widthwise:{password}@postgres:5432" in settings.database_url
        if name != "migrations":
            key = (tmp_path / "s3_access_key_id").read_text().strip()
            assert settings.s3_credentials["access_key_id"] == key
            assert settings.store_url == "s3://widthwise"
    assert used == {f"/run/secrets/{secret}" for secret in compose["secrets"]}


def test_secrets_are_written_once_and_for_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    files = write(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in files} == {0o444}
    before = [file.read_text() for file in files]
    files[0].unlink()
    with pytest.raises(FileExistsError, match="redis_password"):
        write(folder)
    assert not files[0].exists()
    assert [file.read_text() for file in files[1:]] == before[1:]
    assert write(tmp_path / "others")[1].read_text() != before[1]


def test_redis_starts_as_the_compose_file_says_keeps_its_data_and_asks_for_the_password(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    service = compose["services"]["redis"]
    write(tmp_path)
    data = tmp_path / "data"
    data.mkdir()

    def here(line: str) -> str:
        return line.replace("/run/secrets", str(tmp_path)).replace("/data", str(data))

    kind, check = _healthcheck_of(service)
    assert kind == "CMD-SHELL"
    for start in (1, 2):
        with redis_server(options=[here(word) for word in service["command"][1:]]) as url:
            port = url.split(":")[2].split("/")[0]
            command = here(check).replace("$$", "$").replace("redis-cli", f"redis-cli -p {port}")
            assert subprocess.run(["sh", "-c", command]).returncode == 0
            wrong = command.replace("redis_password", "postgres_password")
            assert subprocess.run(["sh", "-c", wrong], stderr=subprocess.DEVNULL).returncode != 0
            password = (tmp_path / "redis_password").read_text().strip()
            with redis.Redis.from_url(url, password=password) as client:
                assert client.incr("starts") == start


@pytest.mark.parametrize(
    ("image", "command"),
    [("api", "api"), ("worker", "worker"), ("worker-gpu", "worker")],
)
def test_containers_run_the_commands_of_make_serve(
    compose: dict[str, Any], image: str, command: str
) -> None:
    """tools/serve.py starts `python -m NAME`; images do the same and compose overrides neither."""
    lines = (ROOT / f"docker/{image}.Dockerfile").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith("CMD ")]
    assert json.loads(found.removeprefix("CMD ")) == ["python", "-m", command]
    service = {"worker": "worker-cpu"}.get(image, image)
    assert compose["services"][service]["build"]["dockerfile"] == f"docker/{image}.Dockerfile"
    assert "command" not in compose["services"][service]
    assert '[python, "-m", name]' in (ROOT / "tools/serve.py").read_text()


@pytest.mark.parametrize("image", DOCKERFILES)
def test_images_copy_what_exists_and_drop_root(image: str) -> None:
    lines = (ROOT / f"docker/{image}.Dockerfile").read_text().splitlines()
    sources = [line.split()[1] for line in lines if re.match(r"COPY (?!--from)", line)]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert "USER 10001:10001" in lines
    assert lines.index("USER 10001:10001") < max(
        number for number, line in enumerate(lines) if line.startswith("CMD ")
    )


def test_hadolint_finds_nothing_in_the_images_and_can_find(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    def lint(*files: Path) -> subprocess.CompletedProcess[str]:
        command = [hadolint, "--no-color", *files]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = lint(*(ROOT / f"docker/{image}.Dockerfile" for image in DOCKERFILES))
    assert (good.returncode, good.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd / && sudo ls\n")
    bad = lint(tmp_path / "Dockerfile")
    assert bad.returncode != 0
    assert "DL3006" in bad.stdout and "DL3004" in bad.stdout


def test_the_api_image_has_no_paddle() -> None:
    assert "worker" not in (ROOT / "docker/api.Dockerfile").read_text()
    assert not re.search(r"^paddle", (ROOT / "requirements/api.txt").read_text(), re.MULTILINE)


def _locked(name: str) -> dict[str, str]:
    """Project -> version. Every entry must be exact and carry at least one hash."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    entries = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n?", "", text)).splitlines()
    versions = {}
    for entry in filter(None, (line.strip() for line in entries)):
        match = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)((?: +--hash=sha256:[0-9a-f]{64})+)", entry)
        assert match, f"requirements/{name}.txt: {entry[:80]!r} is not exact with hashes"
        versions[match[1]] = match[2]
    return versions


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_exact_with_hashes_and_hold_no_address(name: str) -> None:
    assert _locked(name)
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert not re.search(r"://|index-url|find-links|(?m:^-)", text)


def test_locks_agree_on_what_they_share() -> None:
    """Both environments read the same records and files, and dev is installed into both."""
    api, worker, dev = (_locked(name) for name in ("api", "worker", "dev"))
    for first, second in ((api, worker), (dev, worker), (dev, api)):
        shared = first.keys() & second.keys()
        assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


@pytest.mark.parametrize("name", ["api", "worker", "dev"])
def test_locks_hold_every_direct_requirement(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.in").read_text().split()
    wanted = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for line in lines}
    assert wanted <= _locked(name).keys()


def test_import_contracts_hold_and_can_fail(tmp_path: Path) -> None:
    """The contracts of pyproject.toml hold; with one forbidden import added they do not."""

    def lint(root: Path) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as c; c()",
        ]
        return subprocess.run(
            [*command, "--no-cache"],
            cwd=root,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ""},
        )

    good = lint(ROOT)
    assert good.returncode == 0, good.stdout + good.stderr
    for package in ("api", "worker", "jobs", "compression"):
        target = tmp_path / package
        target.mkdir()
        for source in (ROOT / package).rglob("*.py"):
            copy = target / source.relative_to(ROOT / package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (tmp_path / "api/errors.py").open("a") as file:
        file.write("\nimport compression.encoder\nimport worker.runner\n")
    with (tmp_path / "compression/spec.py").open("a") as file:
        file.write("\nimport paddle\n")
    bad = lint(tmp_path)
    assert bad.returncode != 0
    for broken in ("api.errors -> compression.encoder", "api.errors -> worker.runner"):
        assert broken in bad.stdout, bad.stdout
    assert "compression.spec -> paddle" in bad.stdout


def test_every_module_of_compression_is_in_one_half() -> None:
    """A new module is either promised to be paddle-free or forbidden to api and jobs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    free = set(contracts["paddle-free"]["source_modules"])
    for contract in ("paddle-free", "shared-half-only", "child-only"):
        other = {
            m for m in contracts[contract]["forbidden_modules"] if m.startswith("compression.")
        }
        found = {
            f"compression.{path.stem}"
            for path in (ROOT / "compression").iterdir()
            if (path.suffix == ".py" or (path / "__init__.py").exists())
            and path.name != "__init__.py"
        }
        assert not free & other
        assert free | other == found, f"contract {contract}"


def test_strict_typing_covers_what_the_import_contract_calls_paddle_free() -> None:
    """One list, written twice because two tools read it: the types and the import contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    free = {m.replace(".", "/") for m in contracts["paddle-free"]["source_modules"]}
    typed = {f.removesuffix(".py") for f in settings["tool"]["mypy"]["files"]}
    assert free <= typed
    assert {"jobs", "tools"} <= typed


@pytest.mark.parametrize(
    "target",
    [
        "demo", "serve", "test", "check", "fuzz", "chaos", "bench-service", "docs", "secrets",
        "lock", "clean",
    ],
)  # fmt: skip
def test_make_knows_the_documented_targets(target: str) -> None:
    found = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_make_refuses_another_python() -> None:
    found = subprocess.run(
        ["make", "PYTHON=false", "python"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "Python 3.11 or 3.12" in found.stderr


def test_an_unknown_benchmark_is_named() -> None:
    found = subprocess.run(
        ["make", "bench-nothing"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "no benchmarks/nothing.py" in found.stderr


def test_the_page_of_settings_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "docs/settings.md is stale: run make docs"


def test_every_metric_is_documented() -> None:
    told = (ROOT / "docs/monitoring.md").read_text()
    for module in ("api", "worker"):
        metrics = re.findall(r'"(widthwise_\w+)",', (ROOT / module / "metrics.py").read_text())
        assert len(metrics) >= 8
        for name in metrics:
            assert re.search(rf"`{name}(_total)?`", told), name


def test_the_documents_name_no_setting_that_is_not_there() -> None:
    known = {variable_of(name) for name in Settings.model_fields}
    known |= {f"{name}_FILE" for name in known}
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        told = set(re.findall(r"WIDTHWISE_[A-Z0-9_]*[A-Z0-9]", document.read_text()))
        assert told <= known, document.name


def test_the_readmes_commands_name_what_exists() -> None:
    """Modules run with -m and files named in the README and CONTRIBUTING are there."""
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for module in re.findall(r"python -m ([\w.]+)", text):
            if module.split(".")[0] in ("api", "worker", "jobs", "compression", "tools"):
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        for path_text in re.findall(
            r"`((?:api|worker|jobs|compression|tests|tools)/[\w/.]*)`", text
        ):
            assert (ROOT / path_text).exists(), f"{document}: {path_text}"
        for target in re.findall(r"^make ([a-z-]+)", text, re.M):
            assert re.search(rf"^{target.split('-')[0]}", (ROOT / "Makefile").read_text(), re.M)
