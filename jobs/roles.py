"""What an API key may be for: each role may do all that those before it may."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    VIEWER = "viewer"  # reads
    SUBMITTER = "submitter"  # uploads models and datasets, creates and cancels jobs
    ADMIN = "admin"  # makes and revokes the project's keys, reads its audit log

    def includes(self, other: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)
