"""`python -m jobs.set_quotas`: the quotas of projects (jobs.quotas), from the command line of the
installation's host.

    python -m jobs.set_quotas                                  # all projects, their quotas and use
    python -m jobs.set_quotas prj_... --bytes 50GB --running-jobs 2 --queued-jobs none
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import access
from jobs.access import Actor
from jobs.db import Database
from jobs.errors import JobsError
from jobs.migrate import upgrade
from jobs.quotas import MAX_BYTES, MAX_COUNT, Quotas, set_quotas, usage
from jobs.records import Project
from jobs.settings import get_settings

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_NUMBER = re.compile(r"([0-9]{1,18})\s*([kmgt]?)b?", re.IGNORECASE)


def _parse(text: str, *, most: int) -> tuple[int | None]:
    """In a tuple, so that "none" is told from an argument that was not given."""
    if text.lower() == "none":
        return (None,)
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"a number or none, not {text!r}")
    value = int(match[1]) * _UNITS[match[2].lower()]
    if value > most:
        raise argparse.ArgumentTypeError(f"at most {most}")
    return (value,)


def _lines(session: Session, projects: Sequence[Project]) -> list[str]:
    lines = []
    for project in projects:
        limits, used = asdict(Quotas.of(project)), asdict(usage(session, project.id))
        told = [
            f"{name} {used[name]} of {'any number' if limit is None else limit}"
            for name, limit in limits.items()
        ]
        lines.append("  ".join([project.id, project.name, *told]))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.set_quotas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", nargs="?", help="its id; all of them if not given")
    for name in Quotas.__dataclass_fields__:
        most = MAX_BYTES if name == "bytes" else MAX_COUNT
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=partial(_parse, most=most),
            metavar="NUMBER",
        )
    given = parser.parse_args(arguments)
    changes = {
        name: value[0]
        for name in Quotas.__dataclass_fields__
        if (value := getattr(given, name)) is not None
    }
    if changes and given.project is None:
        parser.error("name the project whose quotas are to change")
    database = Database(get_settings().database_url)
    try:
        upgrade(database)
        with database.transaction() as session:
            if changes:
                set_quotas(access.get_project(session, given.project), changes)
                actor = Actor(given.project)
                access.record_action(session, actor, "quotas.changed", given.project, **changes)
            if given.project is None:
                projects = list(session.scalars(select(Project).order_by(Project.created_at)))
            else:
                projects = [access.get_project(session, given.project)]
            lines = _lines(session, projects)
    except JobsError as error:
        print(error.message, file=sys.stderr)
        return 1
    finally:
        database.close()
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
