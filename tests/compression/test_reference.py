"""PaddleSlim's own recipe, in its own process: it agrees with ours, and it runs as an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from compression.batches import Encoded
from compression.distillation import SupernetLosses
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.errors import ReferenceFailed, TrainingDiverged
from compression.evaluate import predict
from compression.importance import Importance, measure_importance
from compression.parallel import Replicas
from compression.pipeline import compress
from compression.reference import run
from compression.reference.exchange import Orders, Request, read_request, write_request
from compression.reorder import descending, reorder
from compression.report import STAGES, Progress
from compression.spec import Spec, TaskSpec
from compression.supernet import subnetwork_of
from compression.tasks import make_task
from compression.training import BatchGradients
from tests.builders import tiny_bert, tiny_dataset
from tests.encoders import OPTIMIZERS, random_weights, tiny_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 20, 4
CONFIG = tiny_config(hidden_dropout=0.0, attention_dropout=0.0)
TASK = make_task(TaskSpec(), ("0", "1", "2"))
SPEC = Spec.model_validate(
    {
        "engine": "paddleslim",
        "supernet": {"width_mults": ["1", "1/2", "1/4"]},
        "distillation": {"batch_size": BATCH, "lambda_rep": 0.3},
    }
)


def even_rows(seed: int = 0) -> Encoded:
    """Rows of one length within each batch: nothing is padded, where the two recipes differ."""
    generator = np.random.default_rng(seed)
    lengths = np.repeat(generator.integers(3, 13, STEPS), BATCH)
    ids = [generator.integers(1, CONFIG.vocab_size, length).tolist() for length in lengths]
    types = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in ids]
    return Encoded(ids, types, generator.integers(0, 3, len(ids)))


REQUEST = Request(SPEC, CONFIG, random_weights(CONFIG, seed=3), even_rows())
BATCHES = list(np.arange(STEPS * BATCH).reshape(STEPS, BATCH))
SUBNETWORKS = [subnetwork_of(CONFIG, width) for width in SPEC.supernet.width_mults]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """PaddleSlim's answers about REQUEST, from a process of its own."""
    folder = tmp_path_factory.mktemp("reference")
    write_request(folder, REQUEST)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference_side", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PIP_NO_INDEX": "1", "PPNLP_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "answer.safetensors")


@pytest.fixture(scope="module")
def scores() -> Importance:
    teacher = build_encoder(CONFIG, REQUEST.weights)
    return measure_importance(teacher, REQUEST.rows, BATCHES, TASK)


def reordered(scores: Importance) -> dict[str, np.ndarray]:
    return reorder(
        CONFIG,
        REQUEST.weights,
        head_orders=[descending(each) for each in scores.heads],
        neuron_orders=[descending(each) for each in scores.neurons],
    )


def part(answer: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in answer.items() if k.startswith(prefix)}


def our_losses(supernet: Encoder, optimizer: paddle.optimizer.Optimizer) -> np.ndarray:
    """The loss of each step and width, [STEPS, widths], trained in place on the same batches."""
    losses = SupernetLosses(
        build_encoder(CONFIG, REQUEST.weights), SUBNETWORKS, SPEC.distillation, TASK
    )
    found = []
    with Replicas(supernet, 1) as replicas:
        gradients = BatchGradients(replicas, REQUEST.rows, losses, 0, False)
        for step, rows in enumerate(BATCHES):
            found.append(list(gradients(rows, step=step).values()))
            optimizer.step()
            optimizer.clear_grad()
    return np.array(found)


def test_paddleslims_importance_is_ours(theirs: dict[str, np.ndarray], scores: Importance) -> None:
    np.testing.assert_allclose(theirs["heads"], np.stack(scores.heads), rtol=1e-4)
    np.testing.assert_allclose(theirs["neurons"], np.stack(scores.neurons), rtol=1e-4)


def test_paddleslims_reordering_is_ours(theirs: dict[str, np.ndarray], scores: Importance) -> None:
    found, expected = part(theirs, "sgd.reordered."), reordered(scores)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_each_width_of_paddleslims_supernet_is_our_sub_network(
    theirs: dict[str, np.ndarray], scores: Importance
) -> None:
    supernet = build_encoder(CONFIG, reordered(scores))
    first = REQUEST.rows.take(range(BATCH))
    for subnetwork in SUBNETWORKS:
        found = theirs[f"sgd.logits.{subnetwork.width_mult}"]
        np.testing.assert_allclose(
            found, predict(supernet, first, subnetwork=subnetwork), atol=1e-5
        )


@pytest.mark.parametrize(("optimizer", "relative"), [("sgd", 1e-5), ("adamw", 1e-3)])
def test_twenty_steps_of_both_recipes_have_the_same_losses(
    theirs: dict[str, np.ndarray], scores: Importance, optimizer: str, relative: float
) -> None:
    supernet = build_encoder(CONFIG, reordered(scores))
    losses = our_losses(supernet, OPTIMIZERS[optimizer](supernet.parameters()))
    np.testing.assert_allclose(theirs[f"{optimizer}.losses"], losses, rtol=relative)
    assert losses[-5:].mean() < losses[:5].mean()  # they moved, so that there was what to compare
    if optimizer == "sgd":  # AdamW turns a gradient that is zero but for rounding into a step
        for name, value in numpy_weights(supernet).items():
            np.testing.assert_allclose(
                theirs[f"sgd.trained.{name}"], value, atol=1e-5, err_msg=name
            )


def test_a_request_reads_back_and_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    orders = Orders((np.array([1, 0]),), (np.array([2, 0, 1]),))
    unlabelled = replace(REQUEST.rows, labels=None)
    write_request(tmp_path, Request(SPEC, CONFIG, REQUEST.weights, unlabelled, orders))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    found = read_request(tmp_path)
    assert (found.spec, found.config) == (SPEC, CONFIG)
    assert found.rows.input_ids == REQUEST.rows.input_ids
    assert found.rows.token_type_ids == REQUEST.rows.token_type_ids
    assert found.rows.labels is None
    assert found.weights.keys() == REQUEST.weights.keys()
    np.testing.assert_array_equal(
        found.weights["classifier.weight"], REQUEST.weights["classifier.weight"]
    )
    assert found.orders is not None
    np.testing.assert_array_equal(found.orders.neurons, orders.neurons)


def test_a_reference_process_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    damaged = replace(REQUEST, config=replace(CONFIG, heads=(4,)))  # of two layers
    with pytest.raises(ReferenceFailed, match=r"(?s)importance process.*status 1.*2 layers"):
        run.measure_importance(tmp_path, damaged, on_batch=lambda done: None)


def test_a_loss_that_is_not_finite_stops_the_engine(tmp_path: Path) -> None:
    weights = {**REQUEST.weights, "pooler.bias": np.full(CONFIG.hidden, np.nan, np.float32)}
    orders = Orders((np.arange(4),) * 2, (np.arange(16),) * 2)
    request = Request(SPEC, CONFIG, weights, REQUEST.rows, orders)
    with pytest.raises(TrainingDiverged, match="at step 1"):
        run.distil(tmp_path, request, on_step=lambda step: None)


@pytest.mark.timeout(600)  # a dozen processes, each of which imports paddle or more
def test_a_job_with_the_engine_paddleslim_ends_like_any_other(tmp_path: Path) -> None:
    """Two steps; what PaddleSlim trained is extracted by us and passes the same parity gate."""
    spec = Spec.model_validate(
        {
            "engine": "paddleslim",
            "task": {"max_seq_len": 32},
            "importance": {"rows": 32},
            "distillation": {"max_steps": 2, "learning_rate": 1e-3},
            "supernet": {"width_mults": ["1/2", "1"]},
            "latency": {"rounds": 5, "baselines": []},
            "export": {"formats": ["onnx"]},
        }
    )
    model = tiny_bert(tmp_path / "model", seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 96, "dev": 40}, seed=1)
    seen: list[Progress] = []
    before = set(sys.modules)
    report = compress(spec, model, dataset, tmp_path / "run", seen.append)
    assert list(dict.fromkeys(p.stage for p in seen)) == list(STAGES)
    losses: list[Any] = [
        p.figures["losses"] for p in seen if p.stage == "distil" and "losses" in p.figures
    ]
    assert len(losses) == report.distillation_steps == 2
    assert set(losses[0]) == {"w1", "w1_2"}
    assert losses[0]["w1"] < losses[0]["w1_2"]  # the full width starts as the teacher
    assert [each.width_mult for each in report.subnetworks] == [Fraction(1), Fraction(1, 2)]
    for subnetwork in report.subnetworks:
        (onnx,) = subnetwork.formats
        assert onnx.published, onnx.error
        assert onnx.parity_max_abs is not None
        assert onnx.parity_max_abs < 1e-4
    assert report.reorder_max_abs < 1e-5
    assert {"paddleslim", "paddlenlp"} <= report.environment.keys()
    # The patched attention stays in its process: neither library was ever loaded here.
    loaded = {name.partition(".")[0] for name in sys.modules.keys() - before}
    assert not {"paddleslim", "paddlenlp"} & loaded
