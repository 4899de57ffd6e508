"""`python -m jobs.keys`: projects and API keys from the command line of the installation's host,
for the first key and where no admin's key is at hand.

A new key is the only line on standard output, so that it can be kept without being shown:
    python -m jobs.keys add "CI of the search team" --role submitter --days 90 > key
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import access
from jobs.access import Actor
from jobs.db import Database, now
from jobs.errors import JobsError, NotFound
from jobs.migrate import upgrade
from jobs.records import DEFAULT_PROJECT, ApiKey, Project
from jobs.roles import Role
from jobs.settings import get_settings

MAX_DAYS = 36_500


@dataclass(frozen=True)
class Outcome:
    """What to print once the transaction has committed; `notes` go to standard error."""

    lines: list[str]
    notes: list[str] = field(default_factory=list)


def add_project(session: Session, name: str) -> Outcome:
    project = access.add_project(session, name=name)
    access.record_action(session, Actor(project.id), "project.created", project.id, name=name)
    return Outcome([project.id])


def list_projects(session: Session) -> Outcome:
    projects = session.scalars(select(Project).order_by(Project.created_at, Project.id))
    return Outcome([f"{project.id}  {project.name}" for project in projects])


def add_key(session: Session, project_id: str, name: str, role: Role, days: int | None) -> Outcome:
    access.get_project(session, project_id)
    key = access.new_key()
    record = access.add_api_key(
        session,
        project_id=project_id,
        name=name,
        hash=access.hash_key(key),
        role=role,
        expires_at=None if days is None else now(session) + timedelta(days=days),
    )
    access.record_action(session, Actor(project_id), "key.created", record.id, name=name, role=role)
    return Outcome([key], notes=[_line(record), "The key is shown this once."])


def list_keys(session: Session, project_id: str) -> Outcome:
    access.get_project(session, project_id)
    keys = select(ApiKey).where(ApiKey.project_id == project_id)
    ordered = session.scalars(keys.order_by(ApiKey.created_at, ApiKey.id))
    return Outcome([_line(key) for key in ordered])


def revoke_key(session: Session, id: str) -> Outcome:
    """Of any project: an operator who was told of a leak has the id and little time."""
    found = session.get(ApiKey, id)
    if found is None:
        raise NotFound("API key", id)
    key, changed = access.revoke_api_key(session, id, project_id=found.project_id)
    if changed:
        access.record_action(session, Actor(key.project_id), "key.revoked", key.id)
    return Outcome([_line(key)])


def _line(key: ApiKey) -> str:
    times = {"expires": key.expires_at, "last used": key.last_used_at, "revoked": key.revoked_at}
    told = [f"{word} {time:%Y-%m-%d %H:%M} UTC" for word, time in times.items() if time]
    return "  ".join([key.id, key.project_id, key.role, key.name, *told])


def _days(text: str) -> int:
    days = int(text)
    if not 1 <= days <= MAX_DAYS:
        raise argparse.ArgumentTypeError(f"a number from 1 to {MAX_DAYS}, not {days}")
    return days


def _name(text: str) -> str:
    name = text.strip()
    if not name.isprintable() or not 1 <= len(name) <= 200:
        raise argparse.ArgumentTypeError("1 to 200 printable characters")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make an API key and show it this once")
    add.add_argument("name", type=_name, help="what it is for")
    add.add_argument("--role", type=Role, choices=list(Role), default=Role.ADMIN)
    add.add_argument("--days", type=_days, help="how long it holds; for ever if not given")
    revoke = commands.add_parser("revoke", help="close an API key, of any project, at once")
    revoke.add_argument("id", help="the id of the key, key_...")
    listing = commands.add_parser("list", help="the API keys of a project")
    for command in (add, listing):
        command.add_argument("--project", default=DEFAULT_PROJECT, help="default: %(default)s")
    commands.add_parser("projects", help="all projects")
    project = commands.add_parser("add-project", help="make a project")
    project.add_argument("name", type=_name)
    return parser


def _run(session: Session, arguments: argparse.Namespace) -> Outcome:
    if arguments.command == "add":
        return add_key(session, arguments.project, arguments.name, arguments.role, arguments.days)
    if arguments.command == "revoke":
        return revoke_key(session, arguments.id)
    if arguments.command == "list":
        return list_keys(session, arguments.project)
    if arguments.command == "add-project":
        return add_project(session, arguments.name)
    return list_projects(session)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with a sentence on standard error."""
    parsed = _parser().parse_args(arguments)
    database = Database(get_settings().database_url)
    try:
        upgrade(database)  # so that the first key can be made before the service first starts
        with database.transaction() as session:
            outcome = _run(session, parsed)
    except JobsError as error:
        print(error.message, file=sys.stderr)
        return 1
    finally:
        database.close()
    for note in outcome.notes:
        print(note, file=sys.stderr)
    for line in outcome.lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
