"""Device profiles: valid blocks, a table that adds up, and nothing but onnxruntime and numpy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import paddle
import pytest
from pydantic import ValidationError

from compression import blocks, cost
from compression.__main__ import main
from compression.blocks import Shape
from compression.device_profile import read_profile
from compression.elastic import ACTIVATIONS
from compression.encoder import build_encoder
from compression.export import Int8Source, export_formats
from compression.prediction import LIMITS, LatencyModel
from compression.profile import Space, measure_setting, settings_between, whole_networks
from compression.spec import Format, LatencyAt
from tests.encoders import random_weights, tiny_config

SHAPE = Shape(hidden=8, head_dim=4, vocab_size=30, labels=3)
ONCE = ("Cast", "Shape", "Slice", "Squeeze", "Unsqueeze")
REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS = {
    "call": blocks.call(),
    "embeddings": blocks.embeddings(SHAPE, 5),
    "attention": blocks.attention(SHAPE, heads=3, layers=2),
    "ffn": blocks.ffn(SHAPE, neurons=7, layers=2),
    "head": blocks.head(SHAPE),
    "token_head": blocks.token_head(SHAPE),
    "network": blocks.network(SHAPE, 5, heads=[3, 1], neurons=[7, 4]),
    "int8 embeddings": blocks.embeddings(SHAPE, 5, int8=True),
    "int8 attention": blocks.attention(SHAPE, heads=3, layers=2, int8=True),
    "int8 ffn": blocks.ffn(SHAPE, neurons=7, layers=2, int8=True),
    "int8 head": blocks.head(SHAPE, int8=True),
    "int8 network": blocks.network(SHAPE, 5, heads=[3, 1], neurons=[7, 4], int8=True),
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
        ("token_head", 8 * 3 + 3),
    ],
)
def test_a_block_has_the_weights_of_its_layers(name: str, expected: int) -> None:
    floats = [each for each in weights_of(BLOCKS[name]).values() if each.dtype == np.float32]
    assert sum(each.size for each in floats if each.ndim > 0) == expected


def test_the_attention_block_computes_attention() -> None:
    model = blocks.attention(SHAPE, heads=3, layers=1)
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


@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_the_feed_forward_block_has_the_models_activation(activation: str) -> None:
    shape = dataclasses.replace(SHAPE, activation=activation)
    model = blocks.ffn(shape, neurons=7, layers=1)
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    matrices = [each for each in weights_of(model).values() if each.ndim]
    w1, b1, w2, b2, scale, shift = matrices
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32) * 50
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inner = paddle.to_tensor(x[0] @ w1 + b1)
    active = ACTIVATIONS[activation](inner).numpy()
    summed = x[0] + active @ w2 + b2
    centred = summed - summed.mean(axis=-1, keepdims=True)
    expected = scale * centred / centred.std(axis=-1, keepdims=True) + shift
    np.testing.assert_allclose(session.run(None, {"x": x})[0][0], expected, atol=1e-4)


@pytest.mark.parametrize("embedding_size", [None, 3])
def test_a_whole_network_runs_and_has_the_weights_of_an_encoder(embedding_size: int | None) -> None:
    shape = dataclasses.replace(SHAPE, embedding_size=embedding_size)
    model = blocks.network(shape, 5, heads=[3, 1], neurons=[7, 4])
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    floats = [each for each in weights_of(model).values() if each.dtype == np.float32]
    config = tiny_config(
        hidden=8, head_dim=4, vocab_size=30, max_positions=5, embedding_size=embedding_size
    )
    expected = cost.parameters(dataclasses.replace(config, heads=(3, 1), ffn=(7, 4)))
    assert sum(each.size for each in floats if each.ndim) == expected
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ids = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]], np.int64)
    feed = {"ids": ids, "types": np.zeros_like(ids), "mask": np.array(ids > 0, np.int64)}
    (logits,) = session.run(None, feed)
    assert logits.shape == (2, 3)
    feed["ids"] = ids + np.where(ids == 0, 9, 0)  # another id under the mask changes nothing
    np.testing.assert_allclose(session.run(None, feed)[0], logits, atol=1e-5)


def test_the_runtime_makes_of_blocks_what_it_makes_of_the_files_that_jobs_write(
    tmp_path: Path,
) -> None:
    """The same kernels after its fusions, but for a few cheap ones that come once in a call."""
    config = tiny_config(hidden=96, head_dim=16, vocab_size=30, heads=(3, 3), ffn=(64, 64))
    shape = dataclasses.replace(SHAPE, hidden=96, head_dim=16)
    rows = np.ones((2, 5), np.int64)
    np.savez(tmp_path / "rows.npz", input_ids=rows, token_type_ids=0 * rows, attention_mask=rows)
    formats: tuple[Format, ...] = ("onnx", "onnx-int8-dynamic")
    exported = export_formats(
        formats,
        build_encoder(config, random_weights(config)),
        tmp_path,
        labels=None,
        int8=Int8Source(tmp_path / "rows.npz", tmp_path),
    )

    def kernels(model: str | bytes) -> Counter[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        run = onnx.load(str(tmp_path / "optimized.onnx")).graph.node
        found = Counter(node.op_type for node in run)
        return Counter({name: found[name] for name in found if name not in ONCE})

    for fmt, file in exported.items():
        assert file.error is None
        int8 = fmt != "onnx"
        own = kernels(blocks.network(shape, 5, heads=[3, 3], neurons=[64, 64], int8=int8))
        assert own == kernels(str(file.folder / "model.onnx")), fmt


def test_sub_networks_of_another_shape_are_left_out(
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
    spec = {"task": {"kind": "token_classification"}}
    report.write_text(json.dumps({"spec": spec, "subnetworks": networks}))
    assert main(command) == 0
    (served,) = [each for each in json.loads(out.read_text())["networks"] if each["served"]]
    assert (served["heads"], served["measured_ms"]) == ([2, 2], 1.0)
    assert served["head"] == "token"
    told = capsys.readouterr().out
    assert "wide is left out: heads 3 lies outside the profile, which has from 1 to 2" in told
    assert "other is left out: its FLOPs are not those of the profile's hidden size, 64" in told
    assert "2 layers, heads 2, neurons 4, exported: predicted" in told


def test_a_table_has_every_count_in_milliseconds_of_one_layer() -> None:
    space = Space(SHAPE, heads=(1, 2), ffn=(4,), layers=2)
    setting = {"batch_size": 2, "seq_len": 5, "threads": 1}
    networks = whole_networks(space, seed=0)
    tables, taken = measure_setting(space, setting, networks, rounds=3)
    assert [table["format"] for table in tables] == ["onnx", "onnx-int8-dynamic"]
    assert len(taken) == len(networks) and min(taken) > 0
    for table in tables:
        assert {axis: table[axis] for axis in setting} == setting
        assert set(table["attention"]) == {"1", "2"} and set(table["ffn"]) == {"4"}
        assert table["call"] > 0
        model = LatencyModel([table])
        assert model.predict(setting, heads=[1, 2], ffn=[4, 4]) >= table["call"]


def test_predictions_are_held_against_networks_of_every_kind() -> None:
    space = Space(SHAPE, heads=(2, 12), ffn=(10, 100), layers=6)
    found = whole_networks(space, seed=1)
    assert [each.format for each in found] == ["onnx"] * 4 + ["onnx-int8-dynamic"] * 4
    widest, narrowest, drawn, shallow = found[:4]
    assert (widest.heads, widest.ffn) == ((12,) * 6, (100,) * 6)
    assert (narrowest.heads, narrowest.ffn) == ((2,) * 6, (10,) * 6)
    assert len(drawn.heads) == 6 and len(set(drawn.heads)) > 1 and len(set(drawn.ffn)) > 1
    assert len(shallow.heads) == len(shallow.ffn) == 3
    assert whole_networks(space, seed=2)[2] != drawn
    single = Space(SHAPE, heads=(2,), ffn=(10,), layers=1, formats=("onnx",))
    assert len(whole_networks(single, seed=1)) == 1  # and not four times the same


def test_settings_between_the_measured_ones_are_tried_too() -> None:
    values = {"batch_size": [1, 2, 9], "seq_len": [64, 16], "threads": [2]}
    assert list(settings_between(values)) == [
        {"batch_size": 5, "seq_len": 64, "threads": 2},
        {"batch_size": 1, "seq_len": 40, "threads": 2},
    ]


def test_the_command_writes_what_the_service_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    small = "--hidden 8 --head-dim 4 --vocab-size 30 --layers 1 --heads 1 2 --ffn 4 --rounds 2"
    setting = "--batch-size 1 4 --seq-len 5"
    assert main(["profile", "--out", str(out), *small.split(), *setting.split()]) == 0
    profile = read_profile(out)
    assert [table.batch_size for table in profile.tables] == [1, 1, 4, 4]
    assert {network.batch_size for network in profile.networks} == {1, 2, 4}
    assert profile.shape.hidden == 8 and profile.shape.activation == "gelu"
    assert profile.device.libraries["onnxruntime"] == onnxruntime.__version__
    errors = profile.errors
    assert list(errors) == ["onnx", "onnx-int8-dynamic"]
    assert sum(error.networks for error in errors.values()) == len(profile.networks)
    told = capsys.readouterr()
    for fmt, error in errors.items():
        assert error.served == 0
        assert f"{fmt}: of {error.networks} whole networks, predictions are" in told.out
    assert "measuring setting 3 of 3" in told.err


def test_exported_files_of_bundles_are_timed_on_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(hidden=8, head_dim=4, vocab_size=30, heads=(2, 2), ffn=(4, 4))
    folder = tmp_path / "w1"
    export_formats(("onnx",), build_encoder(config, random_weights(config)), folder, labels=None)
    latency = {"batch_size": 1, "seq_len": 8, "threads": 1}
    manifest = {
        "spec": {"task": {"kind": "classification"}},
        "subnetwork": {"heads": [2, 2], "ffn": [4, 4]},
        "metrics": {"flops": cost.flops(config, 8)},
        "formats": {
            "onnx": {
                "format": "onnx",
                "files": [{"path": "onnx/model.onnx"}],
                "latencies": [latency],
            }
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "profile.json"
    small = "--head-dim 4 --vocab-size 30 --layers 2 --heads 1 2 --ffn 4 --rounds 2 --seq-len 6"
    command = ["profile", "--out", str(out), *small.split(), "--bundle", str(folder)]
    assert main([*command, "--hidden", "8"]) == 0
    assert read_profile(out).errors["onnx"].served == 1
    out.unlink()
    assert main([*command, "--hidden", "80"]) == 2
    assert "its FLOPs are not those of the profile's hidden size, 80" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--out", "there is no folder"),
        ("--report", "there is no file"),
        ("--bundle", "is no unpacked bundle: it has no manifest.json"),
    ],
)
def test_a_path_that_leads_nowhere_is_told_before_anything_is_measured(
    tmp_path: Path, option: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--out", str(tmp_path / "p.json"), option, str(tmp_path / "no" / "p")])
    assert told in capsys.readouterr().err


OUTSIDE = {
    "spec": {"task": {"kind": "classification"}},
    "subnetwork": {"heads": [3], "ffn": [384]},
    "metrics": {"flops": 1},
    "formats": {"onnx": {"format": "onnx", "files": [{"path": "../model.onnx"}]}},
}


@pytest.mark.parametrize(
    ("option", "content", "told"),
    [
        ("--report", '{"subnetworks": [', "report.json is no job's report: Expecting value"),
        ("--report", "{}", "report.json is no job's report: it lacks 'subnetworks'"),
        ("--report", "[1]", "is no job's report: list indices must be integers"),
        ("--report", '{"subnetworks": [{"heads": [3], "ffn": 4}]}', "no job's report"),
        ("--report", "[" * 100_000, "report.json is no job's report: "),
        ("--bundle", "{", "manifest.json is no bundle's manifest: Expecting property name"),
        ("--bundle", '{"subnetwork": {}, "formats": {}}', "is no bundle's manifest: it lacks"),
        ("--bundle", json.dumps(OUTSIDE), "has no file ../model.onnx"),
    ],
)
def test_a_file_to_hold_predictions_against_is_read_before_anything_is_measured(
    tmp_path: Path, option: str, content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    folder, out = tmp_path / "w1", tmp_path / "p.json"
    folder.mkdir()
    (folder / ("manifest.json" if option == "--bundle" else "report.json")).write_text(content)
    path = folder if option == "--bundle" else folder / "report.json"
    assert main(["profile", "--out", str(out), option, str(path)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--heads 0", "0 is not 1 to 1048576"),
        ("--threads x", "'x' is no whole number from 1 to 1048576"),
        ("--rounds 99999999999", "'99999999999' is no whole number"),
        ("--seq-len 16 513", "--seq-len: 513 is not 2 to 512"),
        ("--batch-size 257", "--batch-size: 257 is not 1 to 256"),
        ("--threads 257", "--threads: 257 is not 1 to 256"),
        ("--layers 65", "--layers: 65 is more than 64"),
        (f"--heads {'1 ' * 65}", "--heads: more than 64 counts"),
        ("--batch-size 1 2 4 8 --seq-len 16 32 64 128 --threads 1 2", "name fewer"),
    ],
)
def test_what_the_service_would_not_read_is_not_measured(
    tmp_path: Path, options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--out", str(tmp_path / "p.json"), *options.split()])
    assert told in capsys.readouterr().err


def test_a_memory_that_is_too_small_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not tried for real: a host may promise what it has not, and then kill the tests for it."""

    def too_large(*args: Any, **options: Any) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(blocks, "call", too_large)
    out = tmp_path / "p.json"
    assert main(["profile", "--out", str(out)]) == 2
    assert "the memory is too small for models of this shape" in capsys.readouterr().err
    assert not out.exists()


def test_the_limits_of_a_profile_are_those_of_a_spec() -> None:
    for axis, (lowest, highest) in LIMITS.items():
        LatencyAt.model_validate({axis: lowest})
        LatencyAt.model_validate({axis: highest})
        for beyond in (lowest - 1, highest + 1):
            with pytest.raises(ValidationError):
                LatencyAt.model_validate({axis: beyond})


DEVICE_HAS = ("compression", "numpy", "onnxruntime")


def test_a_device_needs_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    options = ["--hidden", "8", "--head-dim", "4", "--heads", "1", "--ffn", "4", "--rounds", "2"]
    words = ["profile", "--out", str(tmp_path / "p.json"), *options]
    program = f"""
import sys

class Nothing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, *{DEVICE_HAS!r}}}:
            raise ModuleNotFoundError(f"a device has no {{name}}", name=name)

sys.meta_path.insert(0, Nothing)
from compression.__main__ import main
sys.exit(main({words!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
