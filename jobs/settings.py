"""The service's settings: the only reader of the environment (variables `WIDTHWISE_...`).

S3 credentials are not settings: obstore reads the standard AWS variables itself.
"""

from __future__ import annotations

import re
from functools import cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

GIB = 1024**3
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")


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


def _sqlite_url(values: dict[str, Any]) -> str:
    return f"sqlite:///{values['data_dir'] / 'widthwise.db'}" if "data_dir" in values else ""


def _local_store_url(values: dict[str, Any]) -> str:
    return (values["data_dir"] / "objects").as_uri() if "data_dir" in values else ""


class Settings(BaseSettings):
    """Everything that differs between the embedded and the production profile."""

    model_config = SettingsConfigDict(
        env_prefix="WIDTHWISE_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("data"), validate_default=True, description="All local files live below it."
    )
    database_url: str = Field(
        default_factory=_sqlite_url,
        repr=False,  # may hold a password
        description="sqlite:///... or postgresql+psycopg://...",
    )
    broker_url: str = Field(
        "filesystem://", repr=False, description="filesystem:// (in data_dir) or redis://..."
    )
    store_url: str = Field(
        default_factory=_local_store_url, description="file:///folder or s3://bucket/prefix"
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_upload_bytes: int = Field(4 * GIB, ge=1)
    rate_limit_per_minute: int = Field(
        3000, ge=0, le=10**9, description="Requests that each API key has; 0: no limit."
    )
    cors_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_origins)
    ] = Field(
        default_factory=tuple,
        description="Origins (https://portal.example, separated by commas; * for any) whose pages "
        "may call the API.",
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
        default_factory=tuple,
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
    reconcile_seconds: float = Field(30, gt=0)
    cancel_poll_seconds: float = Field(2, gt=0, le=5)
    stop_grace_seconds: float = Field(8, ge=0, description="Between SIGTERM and SIGKILL.")
    checkpoint_seconds: float = Field(
        300, gt=0, description="Between two checkpoints of a training."
    )
    max_runs: int = Field(3, ge=1, description="Automatic runs of a job before it fails.")
    worker_slots: int = Field(1, ge=1, le=64, description="Jobs at once in one worker.")
    orphan_grace_seconds: float = Field(
        3600, ge=0, description="Age at which the objects of runs that came to nothing go."
    )

    measure_training: bool = Field(
        True,
        description="Whether a worker measures once, when it first starts, which threads and math "
        "library settings train fastest on its machine.",
    )

    signing_key: Annotated[Path, AfterValidator(_absolute)] | None = Field(
        None, description="File of the Ed25519 private key that a worker signs bundles with."
    )

    sandbox_seconds: float = Field(300, gt=0)
    sandbox_memory_bytes: int = Field(4 * GIB, ge=1)
    sandbox_output_bytes: int = Field(8 * GIB, ge=1)
    sandbox_max_files: int = Field(1000, ge=1)

    metrics_host: str = Field("127.0.0.1", description="Address that metrics are served on.")
    api_metrics_port: int = Field(
        0, ge=0, le=65535, description="Where the API serves /metrics; 0: nowhere."
    )
    worker_metrics_port: int = Field(
        0, ge=0, le=65535, description="Where a worker serves /metrics; 0: nowhere."
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @property
    def redis_url(self) -> str | None:
        """Where processes meet beside the database; None on one machine without a Redis."""
        found = self.broker_url.startswith(("redis://", "rediss://"))
        return self.broker_url if found else None

    @property
    def work_dir(self) -> Path:
        """Folders of runs in progress on this host."""
        return self.data_dir / "work"


@cache
def get_settings() -> Settings:
    """The settings of this process, read once from its environment."""
    return Settings()
