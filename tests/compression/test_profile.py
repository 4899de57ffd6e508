"""Device profiles: valid blocks, a table that adds up, and nothing but onnxruntime and numpy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from compression import blocks, cost
from compression.__main__ import main
from compression.blocks import Shape
from compression.profile import errors, measure_blocks, predict
from tests.encoders import tiny_config

SHAPE = Shape(hidden=8, head_dim=4, vocab_size=30, labels=3)
REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS = {
    "call": blocks.call(2, 5),
    "embeddings": blocks.embeddings(SHAPE, 2, 5),
    "attention": blocks.attention(SHAPE, 2, 5, heads=3, layers=2),
    "ffn": blocks.ffn(SHAPE, 2, 5, neurons=7, layers=2),
    "head": blocks.head(SHAPE, 2, 5),
}


def weights_of(model: bytes) -> dict[str, np.ndarray]:
    graph = onnx.load_model_from_string(model).graph
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_what_the_onnx_package_reads_and_calls_valid(name: str) -> None:
    onnx.checker.check_model(onnx.load_model_from_string(BLOCKS[name]), full_check=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embeddings", 30 * 8 + 2 * 8 + 5 * 8 + 2 * 8),
        ("attention", 2 * (3 * (8 * 12 + 12) + 12 * 8 + 8 + 2 * 8)),
        ("ffn", 2 * (8 * 7 + 7 + 7 * 8 + 8 + 2 * 8)),
        ("head", 8 * 8 + 8 + 8 * 3 + 3),
    ],
)
def test_a_block_has_the_weights_of_its_layers(name: str, expected: int) -> None:
    floats = [each for each in weights_of(BLOCKS[name]).values() if each.dtype == np.float32]
    assert sum(each.size for each in floats if each.ndim > 0) == expected


def test_the_attention_block_computes_attention() -> None:
    model = blocks.attention(SHAPE, 1, 5, heads=3, layers=1)
    matrices = [each for each in weights_of(model).values() if each.dtype == np.float32]
    _, wq, bq, wk, bk, wv, bv, wo, bo, scale, shift = matrices
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    mask = np.where(np.arange(5) < 4, 0.0, -1e9).astype(np.float32).reshape(1, 1, 1, 5)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x, "mask": mask})[0]

    def split(units: np.ndarray) -> np.ndarray:
        return units.reshape(5, 3, 4).transpose(1, 0, 2)

    query, key, value = split(x[0] @ wq + bq), split(x[0] @ wk + bk), split(x[0] @ wv + bv)
    scores = query @ key.transpose(0, 2, 1) / 2 + mask[0]
    shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    read = (shares @ value).transpose(1, 0, 2).reshape(5, 12)
    summed = x[0] + read @ wo + bo
    centred = summed - summed.mean(axis=-1, keepdims=True)
    expected = scale * centred / centred.std(axis=-1, keepdims=True) + shift
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


TABLE = {
    "batch_size": 1,
    "seq_len": 8,
    "threads": 1,
    "call": 0.5,
    "embeddings": 1.0,
    "head": 0.25,
    "attention": {"2": 2.0, "4": 3.0, "10": 9.0},
    "ffn": {"100": 1.0, "50": 0.5},
}


def test_a_prediction_is_the_sum_of_its_blocks() -> None:
    assert predict(TABLE, heads=[4, 2], ffn=[100, 50]) == pytest.approx(1.75 + 5.0 + 1.5)
    assert predict(TABLE, heads=[3, 7], ffn=[75, 75]) == pytest.approx(1.75 + 8.5 + 1.5)
    with pytest.raises(ValueError, match="11 lies outside the profile, which goes from 2 to 10"):
        predict(TABLE, heads=[11], ffn=[50])


def test_a_prediction_is_held_against_what_a_job_measured_in_the_same_setting() -> None:
    def latency(batch_size: int, p50: float) -> dict[str, Any]:
        return {"batch_size": batch_size, "seq_len": 8, "threads": 1, "p50_ms": p50}

    formats = [
        {"format": "onnx", "latencies": [latency(1, 4.0), latency(16, 40.0)]},
        {"format": "paddle", "latencies": [latency(1, 9.0)]},
    ]
    report = {"subnetworks": [{"name": "w1", "heads": [2], "ffn": [50], "formats": formats}]}
    (found,) = errors([TABLE], report)
    assert (found["subnetwork"], found["batch_size"]) == ("w1", 1)
    assert found["predicted_ms"] == pytest.approx(4.25)
    assert found["error"] == pytest.approx(0.0625)


def test_sub_networks_of_another_shape_are_left_out_and_the_measurement_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latency = {"batch_size": 1, "seq_len": 8, "threads": 1, "p50_ms": 1.0}

    def network(name: str, heads: int, *, hidden: int) -> dict[str, Any]:
        config = dataclasses.replace(
            tiny_config(), hidden=hidden, head_dim=4, layers=2, heads=(heads,) * 2, ffn=(4, 4)
        )
        return {
            "name": name,
            "heads": config.heads,
            "ffn": config.ffn,
            "flops": cost.flops(config, 8),
            "formats": [{"format": "onnx", "latencies": [latency]}, {"format": "safetensors"}],
        }

    networks = [
        network("fits", 2, hidden=64),
        network("wide", 3, hidden=64),
        network("other", 2, hidden=96),
    ]
    out, report = tmp_path / "profile.json", tmp_path / "report.json"
    small = "--hidden 64 --head-dim 4 --vocab-size 30 --heads 1 2 --ffn 4 --rounds 2 --seq-len 8"
    command = ["profile", "--out", str(out), *small.split(), "--report", str(report)]
    report.write_text(json.dumps({"subnetworks": networks}))
    assert main(command) == 0
    assert [each["subnetwork"] for each in json.loads(out.read_text())["errors"]] == ["fits"]
    told = capsys.readouterr().out
    assert "wide is left out: heads: 3 lies outside the profile" in told
    assert "other is left out: its FLOPs are not those of the profile's hidden size, 64" in told

    out.unlink()
    report.write_text("{}")
    with pytest.raises(KeyError):
        main(command)
    assert json.loads(out.read_text())["tables"]


def test_a_table_has_every_count_in_milliseconds_of_one_layer() -> None:
    table = measure_blocks(
        SHAPE, heads=[1, 2], ffn=[4], layers=2, batch_size=2, seq_len=5, threads=1, rounds=3
    )
    assert (table["batch_size"], table["seq_len"], table["threads"]) == (2, 5, 1)
    assert set(table["attention"]) == {"1", "2"} and set(table["ffn"]) == {"4"}
    assert table["call"] > 0
    assert predict(table, heads=[1, 2], ffn=[4, 4]) >= table["call"]


def test_the_command_writes_a_table_for_each_setting(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    small = "--hidden 8 --head-dim 4 --vocab-size 30 --layers 1 --heads 1 2 --ffn 4 --rounds 2"
    setting = "--batch-size 1 2 --seq-len 5"
    assert main(["profile", "--out", str(out), *small.split(), *setting.split()]) == 0
    profile = json.loads(out.read_text())
    assert [table["batch_size"] for table in profile["tables"]] == [1, 2]
    assert profile["shape"] == {"hidden": 8, "head_dim": 4, "vocab_size": 30, "labels": 2}


def test_a_device_needs_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    options = ["--hidden", "8", "--head-dim", "4", "--heads", "1", "--ffn", "4", "--rounds", "2"]
    words = ["profile", "--out", str(tmp_path / "p.json"), *options]
    program = (
        f"import sys; from compression.__main__ import main; main({words!r})\n"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'pydantic', 'paddle', 'onnx', 'yaml', 'tokenizers', 'onnxruntime'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "{'onnxruntime'}"
