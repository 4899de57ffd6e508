from __future__ import annotations

import pytest

from jobs.states import TRANSITIONS, IllegalTransition, JobState, check_transition


def test_a_job_that_has_ended_moves_only_to_be_retried() -> None:
    final = {state for state in JobState if state.is_final}
    assert final == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    for before in final:
        for after in JobState:
            if after == JobState.QUEUED and before != JobState.SUCCEEDED:
                check_transition(before, after)
                continue
            with pytest.raises(IllegalTransition):
                check_transition(before, after)


def test_every_state_can_be_reached_and_ended() -> None:
    def reachable(state: JobState) -> set[JobState]:
        found = {state}
        while more := {after for before in found for after in TRANSITIONS[before]} - found:
            found |= more
        return found

    assert reachable(JobState.QUEUED) == set(JobState)
    for state in JobState:
        assert any(after.is_final for after in reachable(state))
