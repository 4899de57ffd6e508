from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compression.errors import InvalidModel
from compression.teachers import (
    EncoderConfig,
    check_checkpoint,
    legal_widths,
    parameter_shapes,
    read_checkpoint,
    read_config,
    write_checkpoint,
)
from tests.builders import tiny_bert, tiny_paddlenlp, write_json


def _weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "model.safetensors"))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    weights = _weights(folder)
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not ...})


def test_a_huggingface_checkpoint_becomes_ours_with_linear_weights_transposed(
    tmp_path: Path,
) -> None:
    folder = tiny_bert(tmp_path / "model")
    checkpoint = read_checkpoint(folder)
    stored = _weights(folder)
    assert checkpoint.layout == "huggingface"
    shapes = {name: array.shape for name, array in checkpoint.tensors.items()}
    assert shapes == parameter_shapes(checkpoint.config)
    assert {array.dtype for array in checkpoint.tensors.values()} == {np.dtype(np.float32)}
    for ours, theirs in (
        ("layers.1.attention.query.weight", "bert.encoder.layer.1.attention.self.query.weight"),
        ("layers.0.attention.output.weight", "bert.encoder.layer.0.attention.output.dense.weight"),
        ("layers.0.ffn.intermediate.weight", "bert.encoder.layer.0.intermediate.dense.weight"),
        ("layers.1.ffn.output.weight", "bert.encoder.layer.1.output.dense.weight"),
        ("pooler.weight", "bert.pooler.dense.weight"),
        ("classifier.weight", "classifier.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.tensors[ours], stored[theirs].T)
    for ours, theirs in (
        ("embeddings.word.weight", "bert.embeddings.word_embeddings.weight"),
        ("embeddings.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
        ("layers.0.attention.norm.bias", "bert.encoder.layer.0.attention.output.LayerNorm.bias"),
        ("layers.0.ffn.norm.weight", "bert.encoder.layer.0.output.LayerNorm.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.tensors[ours], stored[theirs])


def test_both_layouts_of_the_same_weights_read_the_same(tmp_path: Path) -> None:
    huggingface = read_checkpoint(tiny_bert(tmp_path / "hf", num_labels=3))
    paddlenlp = read_checkpoint(
        tiny_paddlenlp(tmp_path / "pd", num_labels=3, weights_file="model.safetensors")
    )
    assert paddlenlp.layout == "paddlenlp"
    assert paddlenlp.config == huggingface.config
    assert paddlenlp.tensors.keys() == huggingface.tensors.keys()
    for name, array in huggingface.tensors.items():
        np.testing.assert_array_equal(paddlenlp.tensors[name], array)


def test_paddlenlps_old_nested_config_is_read(tmp_path: Path) -> None:
    folder = tiny_paddlenlp(tmp_path, weights_file="model.safetensors")
    plain = read_checkpoint(folder).config
    old = json.loads((folder / "config.json").read_text())
    for name in ("architectures", "model_type", "id2label"):
        old.pop(name, None)
    (folder / "config.json").unlink()
    write_json(
        folder / "model_config.json",
        {
            "init_args": [{**old, "init_class": "BertModel"}],
            "num_classes": 2,
            "init_class": "BertForSequenceClassification",
        },
    )
    assert read_checkpoint(folder).config == plain


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types_become_float32(tmp_path: Path, dtype: str) -> None:
    wide = read_checkpoint(tiny_bert(tmp_path / "wide"))
    narrow = read_checkpoint(tiny_bert(tmp_path / "narrow", dtype=dtype))
    for name, array in narrow.tensors.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, wide.tensors[name], atol=2e-3)


def test_old_names_prefixes_and_pretraining_parameters(tmp_path: Path) -> None:
    expected = read_checkpoint(tiny_bert(tmp_path / "new", num_labels=None))
    folder = tiny_bert(tmp_path / "old", num_labels=None)
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in _weights(folder).items()
    }
    old["cls.predictions.bias"] = np.zeros(3, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    save_file(old, folder / "model.safetensors")
    found = read_checkpoint(folder)
    assert found.ignored == ("bert.embeddings.position_ids", "cls.predictions.bias")
    assert found.config == expected.config
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


def test_without_a_head_there_are_no_labels_and_the_pooler_may_be_missing(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, num_labels=None)
    _edit_config(folder, id2label={"0": "no", "1": "yes"})
    assert read_checkpoint(folder).config.num_labels is None
    assert read_checkpoint(folder).labels is None
    _edit_weights(folder, lambda w: [w.pop(f"pooler.dense.{part}") for part in ("weight", "bias")])
    assert "pooler.weight" not in read_checkpoint(folder).tensors


def test_with_a_head_the_pooler_may_not_be_missing(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    _edit_weights(
        folder, lambda w: [w.pop(f"bert.pooler.dense.{part}") for part in ("weight", "bias")]
    )
    with pytest.raises(InvalidModel, match=r"missing parameters: 'pooler\.weight'"):
        read_checkpoint(folder)


def test_label_names_are_kept_unless_they_are_placeholders(tmp_path: Path) -> None:
    named = read_checkpoint(tiny_bert(tmp_path / "a", labels=("negative", "positive")))
    assert named.labels == ("negative", "positive")
    assert read_checkpoint(tiny_bert(tmp_path / "b", num_labels=3)).labels is None


def test_type_vocabulary_comes_from_the_weights_where_the_config_is_silent(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    _edit_config(folder, type_vocab_size=...)
    name = "bert.embeddings.token_type_embeddings.weight"
    _edit_weights(folder, lambda w: w.update({name: np.ones((5, 32), np.float32)}))
    assert read_checkpoint(folder).config.type_vocab_size == 5


def test_heads_that_huggingface_pruned_are_known(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    _edit_config(folder, pruned_heads={"1": [0, 3]})

    def prune(weights: dict[str, Any]) -> None:
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                name = f"bert.encoder.layer.1.attention.self.{part}.{kind}"
                weights[name] = weights[name][8:24].copy()
        name = "bert.encoder.layer.1.attention.output.dense.weight"
        weights[name] = np.ascontiguousarray(weights[name][:, 8:24])

    _edit_weights(folder, prune)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.heads == (4, 2)
    assert legal_widths(checkpoint.config) == (Fraction(1), Fraction(1, 2))


def test_our_own_layout_reads_back_what_was_written(tmp_path: Path) -> None:
    teacher = read_checkpoint(tiny_bert(tmp_path / "in", labels=("no", "yes")))
    config = teacher.config.narrowed(Fraction(1, 2))
    generator = np.random.default_rng(1)
    tensors = {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    tensors["pooler.weight"] = tensors["pooler.weight"].T  # a view that does not lie in order
    written = write_checkpoint(tmp_path / "out", config, tensors, teacher.labels)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in written
    )
    found = read_checkpoint(tmp_path / "out")
    assert (found.config, found.labels, found.layout) == (config, ("no", "yes"), "widthwise")
    assert found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


def test_writing_tensors_that_do_not_fit_leaves_nothing(tmp_path: Path) -> None:
    teacher = read_checkpoint(tiny_bert(tmp_path / "in"))
    tensors = {**teacher.tensors, "pooler.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"pooler\.bias"):
        write_checkpoint(tmp_path / "out", teacher.config, tensors, None)
    assert not (tmp_path / "out").exists()


def test_checking_sees_what_reading_sees_and_keeps_nothing(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    checked, read = check_checkpoint(folder), read_checkpoint(folder)
    assert (checked.config, checked.layout, checked.tensors) == (read.config, read.layout, {})
    name = "bert.pooler.dense.bias"
    _edit_weights(folder, lambda w: w.update({name: np.full(32, np.nan, np.float32)}))
    with pytest.raises(InvalidModel, match=name):
        check_checkpoint(folder)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(QUERY), r"missing parameters: 'layers\.0\.attention\.query\.weight'"),
        (lambda w: w.pop("classifier.bias"), r"missing parameters: 'classifier\.bias'"),
        (
            lambda w: w.update({"bert.encoder.layer.0.adapter.weight": np.zeros(3, np.float32)}),
            r"unexpected parameters .*'bert\.encoder\.layer\.0\.adapter\.weight'",
        ),
        (
            lambda w: w.update(
                {"bert.encoder.layer.2.output.dense.bias": w["bert.pooler.dense.bias"]}
            ),
            r"unexpected parameters: 'bert\.encoder\.layer\.2\.output\.dense\.bias'",
        ),
        (
            lambda w: w.update({QUERY: np.zeros((32, 16), np.float32)}),
            r"query\.weight' has the shape \[32, 16\] where the config makes it \[32, 32\]",
        ),
        (
            lambda w: w.update({"classifier.weight": np.zeros((3, 32), np.float32)}),
            r"'classifier\.bias' has the shape \[2\] where the config makes it \[3\]",
        ),
        (
            lambda w: w.update({QUERY.removeprefix("bert."): w[QUERY]}),
            "are the same one, stored twice",
        ),
        (
            lambda w: w.update({QUERY: np.full((32, 32), np.inf, np.float32)}),
            r"query\.weight' holds values that are not finite",
        ),
        (
            lambda w: w.update({QUERY: np.zeros((32, 32), np.int8)}),
            r"query\.weight' is stored as I8, not as a float",
        ),
        (
            lambda w: w.update({QUERY: np.zeros((), np.float32)}),
            r"query\.weight' has the shape \[\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = tiny_bert(tmp_path)
    _edit_weights(folder, edit)
    with pytest.raises(InvalidModel, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must be from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5, not a whole number"),
        ({"hidden_size": True}, "hidden_size is True, not a whole number"),
        ({"hidden_size": [32]}, "hidden_size is a list"),
        ({"hidden_size": 10**900}, "hidden_size is a number of hundreds of digits"),
        ({"intermediate_size": ...}, "intermediate_size is missing"),
        ({"vocab_size": 10**10}, "vocab_size is 10000000000"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny', not a number"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
        ({"pad_token_id": 5000}, "pad_token_id is 5000"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ({"hidden_act": {"a": 1}}, "hidden_act is an object"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"pruned_heads": {"7": [1]}}, "pruned_heads names the layer '7'"),
        ({"pruned_heads": {"1": [0, 1, 2, 3]}}, "pruned_heads of layer 1"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'; known: bert"),
        ({"model_type": ..., "architectures": ...}, "names no model_type"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not name the labels 0 to 1"),
        ({"id2label": ["a", "b"]}, "id2label is not an object"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"problem_type": "regression"}, "'regression', which does not suit a classifier of 2"),
        ({"problem_type": ["a"]}, "which does not suit"),
    ],
)
def test_hostile_and_unsupported_configs_are_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_bert(tmp_path)
    _edit_config(folder, **changes)
    with pytest.raises(InvalidModel, match=message) as caught:
        read_checkpoint(folder)
    assert caught.value.pointer == "config.json"


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{", '{"a": NaN}', "[" * 100_000, '"\ud800"', '{"a": ' * 50_000]
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidModel):
        read_config(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", [4, 0]),
        ("heads", [4, 10**9]),
        ("heads", [4]),
        ("ffn", "64"),
        ("layers", 10**9),
        ("hidden", "32"),
        ("head_dim", -8),
        ("vocab_size", None),
        ("num_labels", 10**9),
        ("activation", "evil"),
        ("family", ["bert"]),
        ("labels", ["a", "a"]),
        ("widthwise_format", 2),
    ],
)
def test_our_own_config_is_not_trusted_either(tmp_path: Path, field: str, value: Any) -> None:
    teacher = read_checkpoint(tiny_bert(tmp_path / "in"))
    write_checkpoint(tmp_path / "out", teacher.config, teacher.tensors, ("no", "yes"))
    _edit_config(tmp_path / "out", **{field: value})
    with pytest.raises(InvalidModel):
        read_checkpoint(tmp_path / "out")


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "a")
    (folder / "config.json").unlink()
    with pytest.raises(InvalidModel, match=r"no config\.json"):
        read_checkpoint(folder)
    pickled = tiny_paddlenlp(tmp_path / "b")
    with pytest.raises(InvalidModel, match=r"model_state\.pdparams is a pickle"):
        read_checkpoint(pickled)
    split = tiny_bert(tmp_path / "c")
    shutil.move(split / "model.safetensors", split / "model.safetensors.index.json")
    with pytest.raises(InvalidModel, match="split over several files"):
        read_checkpoint(split)


def test_config_round_trip(tmp_path: Path) -> None:
    config = read_config(tiny_bert(tmp_path, num_labels=7)).encoder
    assert config.num_labels == 7
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_legal_widths_leave_whole_heads_and_neurons(tmp_path: Path) -> None:
    config = read_config(tiny_bert(tmp_path, heads=8, hidden=32, ffn=12)).encoder
    widths = legal_widths(config)
    # 8 heads allow eighths; 12 neurons only quarters of them.
    assert widths == (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    for width in widths:
        assert all((n * width).denominator == 1 for n in (*config.heads, *config.ffn))
