"""Latency as a sum of blocks: between what was measured, and never beyond it."""

from __future__ import annotations

import pytest

from compression.prediction import LatencyModel, OutsideProfile, head_of
from compression.spec import TASK_KINDS

TABLE = {
    "batch_size": 1,
    "seq_len": 8,
    "threads": 1,
    "call": 0.5,
    "embeddings": 1.0,
    "pooled_head": 0.25,
    "token_head": 0.75,
    "attention": {"2": 2.0, "4": 3.0, "10": 9.0},
    "ffn": {"100": 1.0, "50": 0.5},
}
OWN = {"batch_size": 1, "seq_len": 8, "threads": 1}


def times(factor: float, **setting: int) -> dict[str, object]:
    """The same table, slower, in another setting."""
    slower = {
        key: {count: factor * ms for count, ms in value.items()}
        if isinstance(value, dict)
        else factor * value
        for key, value in TABLE.items()
        if key not in OWN
    }
    return {**slower, **OWN, **setting}


def test_a_prediction_is_the_sum_of_its_blocks() -> None:
    model = LatencyModel([TABLE])
    assert model.predict(OWN, heads=[4, 2], ffn=[100, 50]) == pytest.approx(1.75 + 5.0 + 1.5)
    # Between two counts in a straight line, and in each layer by itself.
    assert model.predict(OWN, heads=[3, 7], ffn=[75, 75]) == pytest.approx(1.75 + 8.5 + 1.5)
    assert model.predict(OWN, heads=[4], ffn=[50]) == pytest.approx(1.75 + 3.0 + 0.5)  # one layer
    token = model.predict(OWN, heads=[4], ffn=[50], head="token")
    assert token == pytest.approx(2.25 + 3.0 + 0.5)


def test_between_settings_it_is_interpolated() -> None:
    tables = [
        times(rows * tokens / cores, batch_size=rows, seq_len=8 * tokens, threads=cores)
        for rows in (1, 5)
        for tokens in (1, 3)
        for cores in (1, 4)
    ]
    model = LatencyModel(tables)
    whole = 1.75 + 3.0 + 0.5

    def at(**setting: int) -> float:
        return model.predict({**OWN, **setting}, heads=[4], ffn=[50])

    assert at() == pytest.approx(whole)
    assert at(batch_size=2) == pytest.approx(2 * whole)
    assert at(seq_len=12) == pytest.approx(1.5 * whole)
    assert at(threads=2) == pytest.approx(whole / 2)  # work that is shared by all threads
    assert at(batch_size=3, seq_len=16, threads=4) == pytest.approx(3 * 2 / 4 * whole)


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"heads": [11]}, "heads", "heads 11 lies outside the profile, which has from 2 to 10"),
        ({"heads": [1]}, "heads", "heads 1 lies"),
        ({"ffn": [101]}, "ffn", "neurons 101 lies outside the profile, which has from 50 to 100"),
        ({"seq_len": 9}, "seq_len", "tokens 9 lies outside the profile, which has 8 and no other"),
        ({"batch_size": 2}, "batch_size", "batch size 2 lies"),
        ({"threads": 2}, "threads", "threads 2 lies"),
    ],
)
def test_beyond_what_was_measured_nothing_is_said(
    asked: dict[str, object], field: str, message: str
) -> None:
    setting = {**OWN, **{key: value for key, value in asked.items() if key in OWN}}
    with pytest.raises(OutsideProfile, match=message) as caught:
        LatencyModel([TABLE]).predict(
            setting,  # type: ignore[arg-type]
            heads=asked.get("heads", [4]),  # type: ignore[arg-type]
            ffn=asked.get("ffn", [50]),  # type: ignore[arg-type]
        )
    assert caught.value.field == field


def test_the_error_is_of_whole_networks() -> None:
    whole = {**OWN, "heads": [2], "ffn": [50], "head": "sequence"}
    networks = [{**whole, "measured_ms": 4.0}, {**whole, "measured_ms": 5.0}]
    assert LatencyModel([TABLE]).errors(networks) == pytest.approx([0.0625, -0.15])


def test_a_network_of_tokens_is_held_against_the_head_that_it_has() -> None:
    model = LatencyModel([TABLE])
    exact = model.predict(OWN, heads=[2], ffn=[50], head="token")
    assert exact == model.predict(OWN, heads=[2], ffn=[50]) + 0.5
    own = {**OWN, "heads": [2], "ffn": [50], "head": "token", "measured_ms": exact}
    assert model.errors([own]) == [0.0]


def test_the_head_of_every_task_is_the_specs() -> None:
    assert {kind: head_of(kind) for kind in TASK_KINDS} == {
        kind: task.head for kind, task in TASK_KINDS.items()
    }
