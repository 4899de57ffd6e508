"""Makes the passwords and keys that docker-compose.yml hands to its services: `make secrets`.

    python3 -m tools.compose_secrets [FOLDER]

Standard library only, so that a host needs nothing but an engine. What is there is never written
over: PostgreSQL keeps the password that it first started with.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import string
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docker/secrets"


def new_secrets() -> dict[str, str]:
    """File name -> content; those of one server belong together."""
    redis_password = secrets.token_urlsafe(32)
    key_id = "".join(secrets.choice(string.ascii_uppercase) for _ in range(20))
    key = secrets.token_urlsafe(32)
    identity = {
        "name": "widthwise",
        "credentials": [{"accessKey": key_id, "secretKey": key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    return {
        "postgres_password": secrets.token_urlsafe(32),
        "redis_password": redis_password,
        "redis_conf": f'requirepass "{redis_password}"',
        "s3_access_key_id": key_id,
        "s3_secret_access_key": key,
        "s3_identities": json.dumps({"identities": [identity]}, indent=2),
    }


def write(folder: Path) -> list[Path]:
    """The files, new. FileExistsError where one of them is there: then none is written.

    The services have users of their own and each must read its files, so everyone may; nobody but
    the owner can enter the folder.
    """
    made = new_secrets()
    if there := [name for name in made if (folder / name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(there)} already: nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, content in made.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content + "\n")
            os.fchmod(descriptor, 0o444)
    return [folder / name for name in made]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    try:
        for path in write(folder):
            print(path)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
