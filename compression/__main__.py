"""python -m compression: a job without the service, or the command that the first word names."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["profile"]:
        # Imported here, as the others are below: it runs on devices that lack what they need.
        from compression import profile

        return profile.main(words[1:])
    from compression import command_line

    return command_line.main(words)


if __name__ == "__main__":
    sys.exit(main())
