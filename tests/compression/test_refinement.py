"""Which sub-networks learn alone, for how long, and what of it a job goes on from."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compression import refinement
from compression.checkpoint import Checkpoints, StageState, host_facts
from compression.encoder import Encoder, numpy_weights
from compression.networks import Networks
from compression.refinement import refine
from compression.report import TrainingReport
from compression.spec import Spec
from compression.supernet import Subnetwork, subnetwork_of
from compression.training import Surroundings
from tests.encoders import tiny_encoder

DONE = TrainingReport(
    steps=2, planned_steps=2, best_step=2, ended="complete", step_seconds=0.1, micro_batch=None
)
FOUND = Subnetwork("p1", None, Fraction(1), (0, 1), (2, 4), (8, 16))
OTHER = Subnetwork("p1", None, Fraction(1), (0, 1), (4, 2), (8, 16))  # another machine's


class Asked:
    """A job, its supernet and its checkpoints; `trained` tells who learnt, and until when."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, until: float | None = None
    ) -> None:
        self.supernet = tiny_encoder(1)
        self.trained: list[tuple[str, float | None]] = []
        self._folder = folder
        self._job: Any = SimpleNamespace(
            spec=Spec.model_validate({"refinement": {"subnetworks": names}}),
            plan=None,
            splits={"train": None},
            task=None,
            replicas=1,
        )
        self._learnt: Any = SimpleNamespace(
            supernet=self.supernet,
            teacher=None,
            subnetworks=[
                subnetwork_of(self.supernet.config, width)
                for width in (Fraction(1), Fraction(1, 2))
            ],
        )
        self.checkpoints = self._opened()
        monkeypatch.setattr(refinement, "deadlines", lambda *told: {"refine": until})
        monkeypatch.setattr(refinement, "distil_alone", self._train)

    def refine(self, *found: Subnetwork) -> dict[str, Encoder]:
        """As a new run of the job does it."""
        self.checkpoints = self._opened()
        self.trained.clear()
        search: Any = SimpleNamespace(subnetworks=list(found)) if found else None
        networks, trainings = refine(
            self._job,
            self._learnt,
            search,
            self.checkpoints,
            self._folder / "work",
            lambda: False,
            lambda *told: None,
        )
        assert list(trainings) == [f"refine {name}" for name in networks]
        return networks

    def _opened(self) -> Checkpoints:
        return Checkpoints(self._folder, identity={}, host=host_facts({}), every_seconds=math.inf)

    def _train(
        self,
        network: Encoder,
        teacher: object,
        subnetwork: Subnetwork,
        rows: object,
        spec: object,
        task: object,
        surroundings: Surroundings,
        **more: object,
    ) -> TrainingReport:
        self.trained.append((subnetwork.name, surroundings.deadline))
        for parameter in network.parameters():
            parameter.set_value(parameter + 1)
        return DONE


def test_what_was_refined_is_not_refined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, monkeypatch, "finalists", "w1_2")
    before = numpy_weights(asked.supernet)
    first = asked.refine(FOUND)
    assert [name for name, _ in asked.trained] == list(first) == ["w1_2", "p1"]
    again = asked.refine(FOUND)
    assert asked.trained == [] and list(again) == ["w1_2", "p1"]
    for name, network in first.items():
        for key, value in numpy_weights(network).items():
            np.testing.assert_array_equal(numpy_weights(again[name])[key], value)
    for key, value in numpy_weights(asked.supernet).items():
        np.testing.assert_array_equal(value, before[key])


def test_a_finalist_of_another_machine_begins_anew_and_its_weights_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, monkeypatch, "finalists", "w1_2")
    asked.refine(OTHER)
    (old,) = (stage for stage in asked.checkpoints.known if stage.startswith("refine p1 "))
    networks = asked.refine(FOUND)
    assert [name for name, _ in asked.trained] == ["p1"]
    assert networks["p1"].config.heads == FOUND.heads
    assert old not in asked.checkpoints.known and len(asked.checkpoints.known) == 2


def test_where_nothing_was_found_finalists_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, monkeypatch, "finalists", "w1_2")
    assert list(asked.refine()) == ["w1_2"]
    asked.checkpoints.save("distil", StageState())
    assert list(Asked(tmp_path, monkeypatch).refine(FOUND)) == []


def test_the_time_that_is_left_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(tmp_path, monkeypatch, "w1", "w1_2", until=1000.0)
    asked.refine()
    (one, half), (other, whole) = asked.trained
    assert (one, other) == ("w1", "w1_2")
    assert half == pytest.approx(500, abs=50) and whole == pytest.approx(1000)
    late = Asked(tmp_path / "late", monkeypatch, "w1", until=0.0)
    late.refine()
    ((_, now),) = late.trained
    assert now is not None and now < 100


def test_a_refined_network_is_cut_out_of_the_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, monkeypatch, "w1_2")
    own = numpy_weights(asked.refine()["w1_2"])
    half = subnetwork_of(asked.supernet.config, Fraction(1, 2))
    cut = Networks(asked.supernet).extracted(half, asked.supernet.config)
    for key, value in numpy_weights(cut).items():
        np.testing.assert_allclose(own[key], value + 1, rtol=1e-6)
