"""The commands that a document tells its readers to type."""

from __future__ import annotations

import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commands_below(document: str, heading: str) -> list[str]:
    """The fenced blocks of a section, in order, up to the next heading of any level."""
    blocks: list[str] = []
    inside, block = False, None
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if block is not None and inside:
                blocks.append(textwrap.dedent("\n".join(block)))
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            inside = line.lstrip("# ") == heading
    assert blocks, f"{document} has no commands below {heading!r}"
    return blocks
