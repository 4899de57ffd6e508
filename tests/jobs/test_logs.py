from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from jobs.redaction import redact, redact_all

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, structlog
from jobs.logs import configure_logging
from jobs.settings import Settings
configure_logging(Settings())
settings = Settings(database_url="postgresql://u:s3cret@h/d")
log = structlog.get_logger("ours")
log.info("hello", key="wwk_s3cret-key", url="redis://u:s3cret@h/0")
log.info("nested", headers={"authorization": ["Bearer wwk_s3cret"]}, keys=("wwk_s3cret",))
logging.getLogger("theirs").warning("failed: %s", "postgresql://u:s3cret@h/d")
try:
    raise ValueError("wwk_s3cret")
except ValueError:
    log.exception("broken")
log.debug("unseen")
log.info("request", path="/\\x1b[31m\\x00")
"""


def run_program(log_format: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=REPOSITORY,
        env={"WIDTHWISE_LOG_FORMAT": log_format},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "s3cret" not in run.stderr
    return run


def test_console_lines_hold_no_secrets() -> None:
    run = run_program("console")
    for word in ("hello", "failed: postgresql://u:***@h/d", "broken", "ValueError: wwk_***"):
        assert word in run.stderr
    assert "unseen" not in run.stderr


def test_a_path_cannot_speak_to_the_terminal() -> None:
    run = run_program("console")
    assert "path=/\\x1b[31m\\x00" in run.stderr
    assert not set(run.stderr) & set("\x1b\x00")


def test_json_lines_hold_no_secrets() -> None:
    run = run_program("json")
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["event"].split(":")[0] for line in lines] == [
        "hello",
        "nested",
        "failed",
        "broken",
        "request",
    ]
    assert "ValueError" in lines[3]["exception"]


def test_redact_leaves_other_text_alone() -> None:
    text = "http://host:8000/v1/jobs?after=job_1 at 12:00, a@b"
    assert redact(text) == text


def test_passwords_are_found_wherever_they_stand() -> None:
    told = "a@b redis://:pw@h/0,x://u:p/w@h:1 (postgresql://u:pw@h/d?a=http://v:pw@w) ://u:@ ://u:p"
    assert redact(told) == (
        "a@b redis://:***@h/0,x://u:***@h:1 (postgresql://u:***@h/d?a=http://v:***@w) ://u:@ ://u:p"
    )


def test_a_long_text_does_not_hold_up_who_redacts_it() -> None:
    """Each path that is asked for is; where every piece was held against all that follows, a
    megabyte of these took half an hour."""
    for text in ("://:" * 250_000, "://:" * 250_000 + " @", "@" + "://" * 300_000):
        assert redact(text) == text


def test_redact_all_reaches_into_what_is_nested_and_keeps_the_rest() -> None:
    value = {"wwk_abc": [("x wwk_abc-d_e y", 1, None, 2.5, True)], "plain": "a@b"}
    assert redact_all(value) == {"wwk_***": [["x wwk_*** y", 1, None, 2.5, True]], "plain": "a@b"}


def test_a_key_is_found_wherever_it_stands() -> None:
    for text in (
        "Xwwk_secret",
        "%20wwk_secret",
        "key=wwk_secret&x",
        '"wwk_secret"',
        "\nwwk_secret",
    ):
        assert "secret" not in redact(text)
