"""The service's settings: the only reader of the environment (variables `WIDTHWISE_...`).

A secret may also stand in a file, which `WIDTHWISE_NAME_FILE` names: so orchestrators hand them to
containers. Secrets are the fields that `repr` leaves out. Where the S3 credentials are not set,
obstore takes them from AWS's variables or the host's role. `make docs` makes a page of this file.
"""

from __future__ import annotations

import os
import re
from functools import cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

PREFIX = "WIDTHWISE_"
GIB = 1024**3
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")
_LOCATION = re.compile(r"/([A-Za-z0-9._~-]+/)+")


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _split(value: Any) -> Any:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """As browsers send them: scheme and host in lower case, a port, nothing after it."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is no origin: write it as https://portal.example or "
                "http://localhost:3000, in lower case and without a path"
            )
    return origins


def _location(prefix: str) -> str:
    if not _LOCATION.fullmatch(prefix):
        raise ValueError("write it as nginx has it, like /objects/, with a slash at both ends")
    return prefix


def _sqlite_url(values: dict[str, Any]) -> str:
    return f"sqlite:///{values['data_dir'] / 'widthwise.db'}" if "data_dir" in values else ""


def _add_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("a password is set, and the URL names no server that would ask for it")
    if parts.password is not None:
        raise ValueError("the URL has a password already: remove it there, or the separate one")
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


def _local_store_url(values: dict[str, Any]) -> str:
    return (values["data_dir"] / "objects").as_uri() if "data_dir" in values else ""


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets out of the files that `WIDTHWISE_NAME_FILE` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = variable_of(field_name)
        path = os.environ.get(f"{variable}_FILE") if is_secret(field) else None
        if not path:
            return None, field_name, False
        if os.environ.get(variable):
            raise SettingsError(f"{variable} and {variable}_FILE are both set: keep one of them.")
        try:
            secret = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{variable}_FILE: {path} cannot be read ({error}).") from error
        if not secret:
            raise SettingsError(f"{variable}_FILE: {path} is empty.")
        return secret, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    """Everything that differs between the embedded and the production profile."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # it may be a password
    )

    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("data"), validate_default=True, description="All local files live below it."
    )
    database_password: str | None = Field(
        None, repr=False, description="Goes into `WIDTHWISE_DATABASE_URL`, which then has none."
    )
    database_url: str = Field(
        default_factory=_sqlite_url,
        validate_default=True,
        repr=False,  # may hold a password
        description="`sqlite:///...` or `postgresql+psycopg://...`",
        json_schema_extra={"shown_default": "SQLite in the data folder"},
    )
    broker_password: str | None = Field(
        None, repr=False, description="Goes into `WIDTHWISE_BROKER_URL`, which then has none."
    )
    broker_url: str = Field(
        "filesystem://",
        validate_default=True,
        repr=False,
        description="The queue: `filesystem://` (in the data folder) or `redis://...`",
    )
    store_url: str = Field(
        default_factory=_local_store_url,
        description="Models, datasets, artifacts: `file:///folder` or `s3://bucket/prefix`",
        json_schema_extra={"shown_default": "a folder in the data folder"},
    )
    s3_access_key_id: str | None = Field(
        None,
        repr=False,
        description="Of the S3 store; without it, AWS's variables or the host's role are used.",
    )
    s3_secret_access_key: str | None = Field(
        None, repr=False, description="Belongs to `WIDTHWISE_S3_ACCESS_KEY_ID`."
    )

    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Its port.")
    max_upload_bytes: int = Field(4 * GIB, ge=1, description="Largest upload.")
    body_timeout_seconds: float = Field(
        60, gt=0, description="A request whose body stands still this long is dropped."
    )
    hsts_seconds: int = Field(
        0,
        ge=0,
        le=10**9,
        description="How long browsers shall ask for this host by HTTPS alone; 0: not said.",
    )
    rate_limit_per_minute: int = Field(
        3000, ge=0, le=10**9, description="Requests that each API key has; 0: no limit."
    )
    idempotency_hours: float = Field(
        24, gt=0, le=8760, description="How long an Idempotency-Key gives its first answer."
    )
    cors_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_origins)
    ] = Field(
        (),
        description="Origins whose pages may call the API: "
        "`https://portal.example,http://localhost:3000`; `*` for any.",
    )

    upload_expires_seconds: float = Field(
        86400, gt=0, description="After the last bytes of a resumable upload that is not finished."
    )
    retention_days: float = Field(
        0,
        ge=0,
        le=36_500,
        description="Artifacts of jobs that ended, and models and datasets without a job since, go "
        "after so long; 0: never.",
    )
    signed_url_seconds: int = Field(
        0,
        ge=0,
        le=7 * 86400,
        description="With a store in S3: downloads are redirected to a signed address that holds "
        "so long; 0: they pass through the API.",
    )
    accel_prefix: Annotated[str, AfterValidator(_location)] | None = Field(
        None,
        description="With a store in a folder, behind nginx: the internal location of that folder "
        "(/objects/), to which downloads are handed over by X-Accel-Redirect.",
    )

    event_streams: int = Field(
        1000, ge=1, le=10**6, description="Watchers of jobs' events in one process of the API."
    )
    event_streams_per_project: int = Field(
        500, ge=1, le=10**6, description="Of these, watchers with keys of one project."
    )

    webhook_allowed_networks: Annotated[
        tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split)
    ] = Field(
        (),
        description="Networks (10.1.0.0/16, separated by commas) that webhooks may call although "
        "they are not public, and with plain http.",
    )
    webhook_timeout_seconds: float = Field(
        15, gt=0, le=60, description="For one attempt, from the name's resolution to the answer."
    )
    webhook_disable_seconds: float = Field(
        5 * 86400, ge=0, description="A webhook to which nothing arrived for so long is disabled."
    )
    webhook_log_seconds: float = Field(
        30 * 86400, gt=0, description="How long the log keeps a delivery that has ended."
    )

    lease_seconds: float = Field(60, gt=0, description="A run that is silent this long is lost.")
    reconcile_seconds: float = Field(
        30, gt=0, description="How often a worker looks for jobs that nobody nudged."
    )
    cancel_poll_seconds: float = Field(
        2, gt=0, le=5, description="How often a run asks whether it was cancelled."
    )
    stop_grace_seconds: float = Field(
        20,
        ge=0,
        description="Between SIGTERM and SIGKILL of a job's process: time for a last checkpoint.",
    )
    worker_stop_seconds: float = Field(
        26,
        gt=0,
        description="After SIGTERM; then a worker hands its jobs back as they are.",
    )
    checkpoint_seconds: float = Field(
        300, gt=0, description="Between two checkpoints of a training."
    )
    progress_seconds: float = Field(
        1.0,
        ge=0,
        description="Between two progress events of a stage, beside its first and last; 0: all are "
        "stored, a row of the database for each training step.",
    )
    max_runs: int = Field(3, ge=1, description="Automatic runs of a job before it fails.")
    worker_slots: int = Field(
        1, ge=0, le=64, description="Jobs at once on the CPU of one worker; 0: none but a GPU's."
    )
    worker_gpus: int | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs that a worker offers, a job each; None: those that nvidia-smi lists.",
    )
    job_time_limit_minutes: float = Field(
        7 * 24 * 60, gt=0, description="Longest that a job may run or ask for, all runs together."
    )
    orphan_grace_seconds: float = Field(
        3600,
        ge=0,
        description="How long objects that nothing needs are kept: those of runs that came to "
        "nothing, of what was deleted, and checkpoints of ended jobs, from which a retry goes on.",
    )

    measure_training: bool = Field(
        True,
        description="A worker measures when it first starts (less than a minute) which threads and "
        "math library settings train fastest there, and keeps the answer in the data folder. "
        "`OMP_*`, `MKL_*` and `MALLOC_*` that it was started with win; a resumed job keeps those "
        "that it began with.",
    )

    signing_key: Annotated[Path, AfterValidator(_absolute)] | None = Field(
        None,
        description="File of the Ed25519 private key that a worker signs bundles with; read when "
        "it starts.",
    )

    sandbox_seconds: float = Field(300, gt=0, description="Longest inspection of an upload.")
    sandbox_tokenizer_seconds: float = Field(
        30, gt=0, description="Processor time that an inspection has for a model's tokenizer."
    )
    sandbox_memory_bytes: int = Field(
        4 * GIB, ge=1, description="Memory that an inspection may take."
    )
    sandbox_output_bytes: int = Field(8 * GIB, ge=1, description="What an upload may unpack to.")
    sandbox_max_files: int = Field(1000, ge=1, description="Files that an upload may unpack to.")

    metrics_host: str = Field("127.0.0.1", description="Address that metrics are served on.")
    api_metrics_port: int = Field(
        0, ge=0, le=65535, description="Where the API serves /metrics; 0: nowhere."
    )
    worker_metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Where a worker or scheduler serves /metrics; 0: nowhere. Each process of a "
        "host needs a port of its own.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="`debug`, `info`, `warning` or `error`"
    )
    log_format: Literal["console", "json"] = Field("console", description="`console` or `json`")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SecretFiles(settings_cls)

    @field_validator("database_url", "broker_url")
    @classmethod
    def _with_password(cls, url: str, info: ValidationInfo) -> str:
        password = info.data.get(str(info.field_name).replace("_url", "_password"))
        return url if password is None else _add_password(url, password)

    @model_validator(mode="after")
    def _whole_credentials(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key: set both or neither")
        return self

    @property
    def s3_credentials(self) -> dict[str, str]:
        """What `open_store` takes; empty where they are looked for elsewhere."""
        if self.s3_access_key_id is None or self.s3_secret_access_key is None:
            return {}
        return {
            "access_key_id": self.s3_access_key_id,
            "secret_access_key": self.s3_secret_access_key,
        }

    @property
    def redis_url(self) -> str | None:
        """Where processes meet beside the database; None on one machine without a Redis."""
        found = self.broker_url.startswith(("redis://", "rediss://"))
        return self.broker_url if found else None

    @property
    def work_dir(self) -> Path:
        """Folders of runs in progress on this host."""
        return self.data_dir / "work"


def variable_of(field_name: str) -> str:
    return PREFIX + field_name.upper()


def is_secret(field: FieldInfo) -> bool:
    """Whether it may hold a secret: then it is not shown, and may stand in a file."""
    return not field.repr


@cache
def get_settings() -> Settings:
    """The settings of this process, read once from its environment."""
    return Settings()
