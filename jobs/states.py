"""The states of a job, every transition there is, and those of deliveries."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether a job in this state has ended: it moves again only if its user retries it."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class RunState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"  # its lease expired
    RELEASED = "released"  # its worker was told to stop and handed the job back


class DeliveryState(StrEnum):
    """Of an event to a webhook."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        {
            JobState.RUNNING,  # claimed by a worker
            JobState.CANCELLED,  # cancelled before any worker took it
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.RUNNING,  # the lease expired and another worker claimed it
            JobState.QUEUED,  # handed back, or the lease expired
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),  # retried
    JobState.CANCELLED: frozenset({JobState.QUEUED}),  # retried
}


class IllegalTransition(AssertionError):
    """A programming error: the code asked for a transition that is not in the table."""


def check_transition(before: JobState, after: JobState) -> None:
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"a job does not go from {before} to {after}")
