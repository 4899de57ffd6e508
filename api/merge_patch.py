"""JSON Merge Patch (RFC 7396)."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 32  # a job's document has six


class TooDeep(ValueError):
    """The patch nests deeper than any document that it could be for."""


def merge_patch(target: Any, patch: Any, *, depth: int = MAX_DEPTH) -> Any:
    """`target` with the patch applied, as a new value: objects member by member, a null removes,
    anything else replaces. TooDeep beyond `depth` objects in each other."""
    if not isinstance(patch, dict):
        return patch
    if depth == 0:
        raise TooDeep
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value, depth=depth - 1)
    return merged
