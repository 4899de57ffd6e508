"""Every family in both toolkits' layouts: against PaddleNLP's classes, and through the method."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from compression import bundle_predict, cost
from compression.batches import Encoded, make_batch, pad, sorted_rows
from compression.encoder import Encoder, build_encoder, with_new_head
from compression.errors import InvalidModel
from compression.export import export_formats, graph_inputs, verify
from compression.importance import measure_importance
from compression.plan import model_info
from compression.reorder import descending, reorder
from compression.spec import Format, TaskSpec
from compression.supernet import extract_weights, subnetwork_of
from compression.tasks import make_task
from compression.teachers import (
    FAMILIES,
    EncoderConfig,
    check_checkpoint,
    parameter_shapes,
    read_checkpoint,
    write_checkpoint,
)
from tests import builders
from tests.builders import tiny_family, write_json
from tests.encoders import as_tensors, tiny_encoder

LAYOUTS = {name: [layout.name for layout in family.layouts] for name, family in FAMILIES.items()}
CASES = [(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]
NUM_LABELS = 3
FORMATS: tuple[Format, ...] = ("safetensors", "paddle", "onnx")


def rows_of(config: EncoderConfig, count: int = 8, *, seed: int = 0) -> Encoded:
    """Rows of 3 to 12 tokens without padding tokens among them; types as the model has them."""
    generator = np.random.default_rng(seed)
    low = config.pad_token_id + 1
    ids = [
        generator.integers(low, config.vocab_size, generator.integers(3, 13)).tolist()
        for _ in range(count)
    ]
    types = [
        generator.integers(0, max(config.type_vocab_size, 1), len(row)).tolist() for row in ids
    ]
    return Encoded(ids, types, generator.integers(0, NUM_LABELS, count))


def encoder_of(folder: Path) -> Encoder:
    checkpoint = read_checkpoint(folder)
    return build_encoder(checkpoint.config, checkpoint.tensors)


def paddlenlps_own(folder: Path, family: str) -> Any:
    """PaddleNLP's classifier with the folder's weights, every one of them used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paddlenlp 2.8.1 uses what its dependencies deprecate
        from paddlenlp import transformers

    name = builders.FAMILIES[family][0]
    config = json.loads((folder / "config.json").read_text())
    model_config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    )
    model = getattr(transformers, f"{name}ForSequenceClassification")(model_config)
    weights = load_file(folder / "model.safetensors")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    unused = {name for name in shapes if "fit_dense" in name}  # TinyBERT's, by its forward
    assert {name: list(array.shape) for name, array in weights.items()} == {
        name: shape for name, shape in shapes.items() if name not in unused
    }
    zeros = {name: np.zeros(shapes[name], np.float32) for name in unused}
    model.set_state_dict({**weights, **zeros})
    model.eval()
    return model


def hidden_states(model: Any, family: str, inputs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The embedding output and each layer's output, caught on their way, and the logits."""
    base = getattr(model, family)
    seen: list[Any] = []
    parts = [getattr(base, "embeddings_project", base.embeddings), *base.encoder.layers]
    for part in parts:
        part.register_forward_post_hook(
            lambda layer, given, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    logits = model(**inputs)
    return seen, logits


@pytest.mark.parametrize("family", LAYOUTS)
def test_hidden_states_and_logits_equal_paddlenlps_own(tmp_path: Path, family: str) -> None:
    # An epsilon large enough to be seen: a toolkit that does not read it must not either here.
    folder = tiny_family(
        tmp_path, family, layout="paddlenlp", num_labels=NUM_LABELS, layer_norm_eps=1e-3
    )
    ours, theirs = encoder_of(folder), paddlenlps_own(folder, family)
    arrays = pad(rows_of(ours.config), range(8), pad_id=ours.config.pad_token_id, length=20)
    inputs = dict(zip(arrays, as_tensors(arrays), strict=True))
    states = ours.encode(*inputs.values())
    if family == "distilbert":
        del inputs["token_type_ids"]
    hidden, logits = hidden_states(theirs, family, inputs)
    np.testing.assert_allclose(states.logits.numpy(), logits.numpy(), atol=1e-5)
    assert np.ptp(logits.numpy(), axis=0).min() > 1e-2  # rows differ: agreement means something
    real = arrays["attention_mask"].astype(bool)
    assert len(states.hidden) == len(hidden) == 3
    for own, other in zip(states.hidden, hidden, strict=True):
        np.testing.assert_allclose(own.numpy()[real], other.numpy()[real], atol=1e-5)


@pytest.mark.parametrize("family", [name for name, layouts in LAYOUTS.items() if len(layouts) == 2])
@pytest.mark.parametrize("num_labels", [NUM_LABELS, None])
def test_both_layouts_read_the_same(tmp_path: Path, family: str, num_labels: int | None) -> None:
    huggingface, paddlenlp = (
        read_checkpoint(
            tiny_family(tmp_path / layout, family, layout=layout, num_labels=num_labels)
        )
        for layout in ("huggingface", "paddlenlp")
    )
    assert (huggingface.layout, paddlenlp.layout) == ("huggingface", "paddlenlp")
    # Where toolkits fix a field in their code, they do so differently; see below.
    alike = {"layer_norm_eps": 0.0, "pooler_activation": ""}
    assert dataclasses.replace(huggingface.config, **alike) == dataclasses.replace(
        paddlenlp.config, **alike
    )
    assert huggingface.tensors.keys() == paddlenlp.tensors.keys()
    for name, array in huggingface.tensors.items():
        np.testing.assert_array_equal(paddlenlp.tensors[name], array)
    if num_labels is not None:
        shapes = {name: array.shape for name, array in huggingface.tensors.items()}
        assert shapes == parameter_shapes(huggingface.config)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_huggingface_names_are_those_that_paddlenlp_converts(tmp_path: Path, family: str) -> None:
    """PaddleNLP's own table from transformers' names to its own, which ours never saw."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = paddlenlps_own(tiny_family(ours, family, layout="paddlenlp", num_labels=3), family)
    model.config.architectures = [type(model).__name__]
    table = {
        mapping.target_name: (mapping.source_name, mapping.action)
        for mapping in type(model)._get_name_mappings(model.config)
    }
    converted = {}
    for name, array in load_file(ours / "model.safetensors").items():
        source, action = table[name]
        converted[source] = np.ascontiguousarray(array.T if action == "transpose" else array)
    tiny_family(theirs, family, num_labels=3)
    save_file(converted, theirs / "model.safetensors")
    found, expected = read_checkpoint(theirs), read_checkpoint(ours)
    assert found.layout == "huggingface"
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_config_as_paddlenlp_saves_it_reads_the_same(tmp_path: Path, family: str) -> None:
    folder = tiny_family(tmp_path, family, layout="paddlenlp", num_labels=NUM_LABELS)
    expected = read_checkpoint(folder).config
    model = paddlenlps_own(folder, family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    saved = json.loads((folder / "config.json").read_text())
    assert "paddlenlp_version" in saved
    assert read_checkpoint(folder).config == expected


def test_an_old_nested_ernie_config_that_leaves_out_its_neurons_is_read(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "ernie", layout="paddlenlp", intermediate_size=3072)
    expected = read_checkpoint(folder).config
    config = json.loads((folder / "config.json").read_text())
    for name in ("architectures", "model_type", "intermediate_size", "layer_norm_eps"):
        del config[name]
    (folder / "config.json").unlink()
    write_json(
        folder / "model_config.json",
        {
            "init_args": [{**config, "init_class": "ErnieModel"}],
            "num_classes": 2,
            "init_class": "ErnieForSequenceClassification",
        },
    )
    assert read_checkpoint(folder).config == expected


def test_what_a_toolkit_fixes_in_its_code_is_taken_from_there(tmp_path: Path) -> None:
    def config(family: str, layout: str, **changes: Any) -> EncoderConfig:
        folder = tiny_family(tmp_path / f"{family}-{layout}", family, layout=layout, **changes)
        return read_checkpoint(folder).config

    assert config("ernie", "huggingface", layer_norm_eps=1e-5).layer_norm_eps == 1e-5
    assert config("ernie", "paddlenlp", layer_norm_eps=1e-5).layer_norm_eps == 1e-12
    assert config("distilbert", "huggingface", layer_norm_eps=1e-5).layer_norm_eps == 1e-12
    assert config("electra", "huggingface", hidden_act="relu").pooler_activation == "gelu"
    assert config("electra", "paddlenlp", hidden_act="relu").pooler_activation == "relu"


@pytest.mark.parametrize("family", LAYOUTS)
def test_padding_a_batch_further_changes_no_logit(tmp_path: Path, family: str) -> None:
    encoder = encoder_of(tiny_family(tmp_path, family, layout="paddlenlp", num_labels=NUM_LABELS))
    data, pad_id = rows_of(encoder.config), encoder.config.pad_token_id
    close = encoder(*as_tensors(pad(data, range(8), pad_id=pad_id))).numpy()
    longest = pad(data, range(8), pad_id=pad_id, length=encoder.config.max_tokens)
    np.testing.assert_allclose(encoder(*as_tensors(longest)).numpy(), close, atol=1e-6)


def test_roberta_counts_positions_from_behind_the_padding_token(tmp_path: Path) -> None:
    encoder = encoder_of(tiny_family(tmp_path, "roberta", max_tokens=64))
    config = encoder.config
    assert (config.max_positions, config.position_offset, config.max_tokens) == (66, 2, 64)
    ids = paddle.full([1, 64], 9, "int64")
    table = encoder.embeddings.position.weight.numpy()
    seen: list[np.ndarray] = []
    encoder.embeddings.position.register_forward_post_hook(
        lambda layer, given, out: seen.append(out.numpy())
    )
    encoder(ids, paddle.zeros_like(ids), paddle.ones_like(ids))
    np.testing.assert_array_equal(seen[0][0], table[2:])


def test_ernie_adds_its_own_task_to_every_token(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "a", "ernie", num_labels=NUM_LABELS)
    encoder = encoder_of(folder)
    inputs = as_tensors(pad(rows_of(encoder.config), range(8), pad_id=0))
    logits = encoder(*inputs).numpy()
    tables = encoder.embeddings.task_type.weight.numpy()
    assert encoder.config.task_id == 2
    for row, differs in ((0, False), (1, False), (2, True)):
        changed = tables.copy()
        changed[row] += 0.5 * np.linspace(-1, 1, 32)
        encoder.embeddings.task_type.weight.set_value(changed.astype(np.float32))
        assert (np.abs(encoder(*inputs).numpy() - logits).max() > 1e-4) == differs


def test_a_model_of_one_token_type_takes_any_type_numbers(tmp_path: Path) -> None:
    for family in ("roberta", "distilbert"):
        encoder = encoder_of(tiny_family(tmp_path / family, family, num_labels=NUM_LABELS))
        ids, types, mask = as_tensors(pad(rows_of(encoder.config), range(8), pad_id=0))
        expected = encoder(ids, types, mask).numpy()
        np.testing.assert_array_equal(encoder(ids, types + 1, mask).numpy(), expected)
        np.testing.assert_array_equal(encoder(ids, None, mask).numpy(), expected)


@pytest.mark.parametrize("family", LAYOUTS)
def test_importance_reordering_and_extraction(tmp_path: Path, family: str) -> None:
    checkpoint = read_checkpoint(
        tiny_family(tmp_path, family, layout="paddlenlp", num_labels=NUM_LABELS)
    )
    config = checkpoint.config
    teacher = build_encoder(config, checkpoint.tensors)
    data = rows_of(config)
    task = make_task(TaskSpec(), tuple(str(i) for i in range(NUM_LABELS)))
    scores = measure_importance(teacher, data, sorted_rows(data, batch_size=4), task)
    assert all((layer > 0).any() for layer in (*scores.heads, *scores.neurons))
    ordered = reorder(
        config,
        checkpoint.tensors,
        head_orders=[descending(layer) for layer in scores.heads],
        neuron_orders=[descending(layer) for layer in scores.neurons],
    )
    supernet = build_encoder(config, ordered)
    batch = make_batch(data, range(8), pad_id=config.pad_token_id)
    before, after = teacher.encode(*batch.inputs), supernet.encode(*batch.inputs)
    for own, other in zip(before.hidden, after.hidden, strict=True):
        np.testing.assert_allclose(other.numpy(), own.numpy(), atol=1e-5)
    np.testing.assert_allclose(after.logits.numpy(), before.logits.numpy(), atol=1e-5)

    for depth in (Fraction(1), Fraction(1, config.layers)):
        half = subnetwork_of(config, Fraction(1, 2), depth)
        small = build_encoder(half.config(config), extract_weights(config, ordered, half))
        np.testing.assert_array_equal(
            small(*batch.inputs).numpy(), supernet(*batch.inputs, subnetwork=half).numpy()
        )


# All that families have beyond BERT, at once: with and without token types.
OWN = {
    "embedding_size": 12, "task_type_vocab_size": 3, "task_id": 1, "position_offset": 2,
    "pooler_activation": "gelu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "typed"),
    [
        ({"type_vocab_size": 2, **OWN}, True),
        ({**OWN, "type_vocab_size": 1, "pooler_activation": "relu_tanh"}, False),
    ],
)
def test_every_format_agrees_in_a_fresh_process(
    tmp_path: Path, changes: dict[str, Any], typed: bool
) -> None:
    encoder = tiny_encoder(**changes)
    arrays = pad(rows_of(encoder.config), range(8), pad_id=encoder.config.pad_token_id)
    np.savez(tmp_path / "batch.npz", **arrays)
    with paddle.no_grad():
        np.savez(tmp_path / "reference.npz", logits=encoder(*as_tensors(arrays)).numpy())
    formats: tuple[Format, ...] = ("onnx",) if typed else FORMATS
    exported = export_formats(formats, encoder, tmp_path / "out", labels=None)
    for fmt in formats:
        assert exported[fmt].error is None
        parity = verify(
            fmt,
            exported[fmt].folder,
            batch=tmp_path / "batch.npz",
            reference=tmp_path / "reference.npz",
            tolerance=1e-4,
        )
        assert parity.error is None
    assert ("token_type_ids" in graph_inputs(encoder.config)) == typed
    reference = encoder(*as_tensors(arrays)).numpy()
    for fmt, load in (("onnx", bundle_predict.load_onnx), ("paddle", bundle_predict.load_paddle)):
        if fmt in formats:
            run = load({path.name: path for path in exported[fmt].files})
            np.testing.assert_allclose(run(arrays), reference, atol=1e-4)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_cost_and_inspection_know_every_family(tmp_path: Path, family: str, layout: str) -> None:
    folder = tiny_family(tmp_path, family, layout=layout, num_labels=NUM_LABELS)
    checkpoint = read_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    assert cost.parameters(checkpoint.config) == sum(array.size for array in stored.values())
    info = model_info(checkpoint)
    assert (info.family, info.layers, info.heads, info.ffn) == (family, 2, 4, 64)
    assert (info.max_positions, info.layout) == (64, layout)
    assert info.legal_widths == (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))


def test_an_embedding_projection_costs_a_product_for_each_token(tmp_path: Path) -> None:
    plain, projected = (
        read_checkpoint(tiny_family(tmp_path / str(size), "electra", embedding_size=size)).config
        for size in (32, 16)
    )
    assert plain.embedding_size is None
    assert cost.flops(projected, 10) - cost.flops(plain, 10) == 2 * 10 * 16 * 32


@pytest.mark.parametrize("family", LAYOUTS)
def test_our_own_layout_keeps_every_family(tmp_path: Path, family: str) -> None:
    teacher = read_checkpoint(tiny_family(tmp_path / "in", family, layout="paddlenlp"))
    write_checkpoint(tmp_path / "out", teacher.config, teacher.tensors, None)
    assert read_checkpoint(tmp_path / "out").config == teacher.config
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["family"] == family
    del fields["position_offset"]  # a field of its own format may not be missing
    write_json(tmp_path / "out" / "config.json", fields)
    with pytest.raises(InvalidModel, match="lacks 'position_offset'"):
        read_checkpoint(tmp_path / "out")


def test_our_own_first_format_is_still_read(tmp_path: Path) -> None:
    teacher = read_checkpoint(tiny_family(tmp_path / "in", "bert"))
    write_checkpoint(tmp_path / "out", teacher.config, teacher.tensors, None)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in (
        "embedding_size", "task_type_vocab_size", "task_id", "position_offset", "pooler_activation",
    ):  # fmt: skip
        del fields[name]
    write_json(tmp_path / "out" / "config.json", {**fields, "widthwise_format": 1})
    assert read_checkpoint(tmp_path / "out").config == teacher.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_size": 0}, "embedding_size is 0"),
        ({"task_id": 3}, "task_id is 3"),
        ({"position_offset": 66}, "position_offset is 66"),
        ({"pooler_activation": "sigmoid"}, "pooler_activation is 'sigmoid'"),
        ({"task_type_vocab_size": -1}, "task_type_vocab_size is -1"),
    ],
)
def test_our_own_new_fields_are_not_trusted(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    teacher = read_checkpoint(tiny_family(tmp_path / "in", "bert"))
    write_checkpoint(tmp_path / "out", teacher.config, teacher.tensors, None)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    write_json(tmp_path / "out" / "config.json", {**fields, **changes})
    with pytest.raises(InvalidModel, match=message):
        read_checkpoint(tmp_path / "out")


# --- heads, old names, other float types ----------------------------------------------------


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_headless_model_gets_a_new_head(tmp_path: Path, family: str, layout: str) -> None:
    checkpoint = read_checkpoint(tiny_family(tmp_path, family, layout=layout, num_labels=None))
    assert checkpoint.config.num_labels is None
    # RoBERTa's classifier has a dense layer of its own, and never uses the bare model's pooler.
    assert ("pooler.weight" in checkpoint.tensors) == (family in ("bert", "tinybert", "ernie"))
    assert bool(checkpoint.ignored) == (family == "roberta")
    config, tensors = with_new_head(checkpoint.config, checkpoint.tensors, num_labels=3, seed=0)
    encoder = build_encoder(config, tensors)
    arrays = pad(rows_of(config), range(8), pad_id=config.pad_token_id)
    assert np.isfinite(encoder(*as_tensors(arrays)).numpy()).all()


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "extras"),
    [
        ("bert", ["cls.predictions.bias", "fit_denses.0.weight", "bert.fit_dense.bias"]),
        ("tinybert", ["tinybert.fit_denses.1.weight", "tinybert.fit_dense.weight"]),
        ("roberta", ["lm_head.dense.weight", "lm_head.bias", "roberta.pooler.dense.weight"]),
        ("roberta", ["roberta.embeddings.position_ids"]),
        ("ernie", ["cls.predictions.decoder_bias", "cls.seq_relationship.weight"]),
        ("electra", ["discriminator_predictions.dense.weight", "generator_lm_head_bias"]),
        ("distilbert", ["vocab_transform.weight", "vocab_projector.bias"]),
    ],
)
def test_pretraining_heads_are_left_out_and_named(
    tmp_path: Path, family: str, extras: list[str]
) -> None:
    folder = tiny_family(tmp_path, family, layout="paddlenlp")
    expected = read_checkpoint(folder)
    edited(folder, lambda w: w.update({name: np.zeros(3, np.float32) for name in extras}))
    found = read_checkpoint(folder)
    assert found.ignored == tuple(sorted(extras))
    assert found.config == expected.config
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize(
    ("end", "name", "task"),
    [
        ("ForTokenClassification", "classifier", "token_classification"),
        ("ForQuestionAnswering", "qa_outputs", "question_answering"),
    ],
)
def test_heads_that_read_every_token_are_known_in_every_family(
    tmp_path: Path, family: str, end: str, name: str, task: str
) -> None:
    folder = tiny_family(
        tmp_path,
        family,
        layout="paddlenlp",
        num_labels=None,
        architectures=[f"{builders.FAMILIES[family][0]}{end}"],
    )
    head = np.random.default_rng(1).normal(size=(32, 2)).astype(np.float32)
    edited(folder, lambda w: w.update({f"{name}.weight": head, f"{name}.bias": head[0]}))
    found = read_checkpoint(folder)
    assert (found.config.head, found.head_task) == ("token", task)
    np.testing.assert_array_equal(found.tensors["classifier.weight"], head)
    np.testing.assert_array_equal(found.tensors["classifier.bias"], head[0])


@pytest.mark.parametrize("family", LAYOUTS)
def test_another_tasks_head_is_refused(tmp_path: Path, family: str) -> None:
    folder = tiny_family(tmp_path, family, layout="paddlenlp", num_labels=None)
    edited(folder, lambda w: w.update({"linear_start.weight": np.zeros((32, 1), np.float32)}))
    with pytest.raises(InvalidModel, match="head of another task: 'linear_start"):
        read_checkpoint(folder)


@pytest.mark.parametrize("family", [name for name in LAYOUTS if name != "tinybert"])
def test_old_norm_names_prefixes_and_half_precision(tmp_path: Path, family: str) -> None:
    expected = read_checkpoint(tiny_family(tmp_path / "new", family))
    folder = tiny_family(tmp_path / "old", family)

    def age(weights: dict[str, Any]) -> None:
        for name in list(weights):
            old = name.removeprefix(f"{family}.")
            old = old.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(name).astype(np.float16)

    found = read_checkpoint(edited(folder, age))
    assert found.config == expected.config
    for name, array in expected.tensors.items():
        assert found.tensors[name].dtype == np.float32
        np.testing.assert_allclose(found.tensors[name], array, atol=2e-3)


def test_bfloat16_weights_of_another_family_are_read(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "electra")
    expected = read_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    header: dict[str, Any] = {}
    data = b""
    for name, array in weights.items():
        upper = (array.view(np.uint32) >> 16).astype("<u2").tobytes()  # a float32's upper half
        offsets = [len(data), len(data) + len(upper)]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += upper
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = read_checkpoint(folder)
    for name, array in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], array, rtol=2**-7, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("roberta", {"pad_token_id": None}, "pad_token_id is missing"),
        ("roberta", {"pad_token_id": 70, "max_position_embeddings": 66}, "leaves no position"),
        ("roberta", {"type_vocab_size": 0}, "type_vocab_size is 0"),
        ("roberta", {"is_decoder": True}, "is_decoder is true"),
        ("ernie", {"use_task_id": "yes"}, "use_task_id is 'yes'"),
        ("ernie", {"task_id": 3}, "task_id is 3; it must be from 0 to 2"),
        ("ernie", {"task_type_vocab_size": 0}, "task_type_vocab_size is 0"),
        ("ernie", {"intermediate_size": "wide"}, "intermediate_size is 'wide'"),
        ("electra", {"embedding_size": None}, "embedding_size is missing"),
        ("electra", {"embedding_size": 10**9}, "embedding_size is 1000000000"),
        ("electra", {"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ("distilbert", {"dim": "32"}, "dim is '32', not a whole number"),
        ("distilbert", {"n_heads": 5}, "dim 32 is not a multiple of n_heads 5"),
        ("distilbert", {"n_layers": None}, "n_layers is missing"),
        ("distilbert", {"activation": "swish"}, "activation 'swish' is not supported"),
        ("distilbert", {"dropout": 2}, "dropout is 2"),
        ("tinybert", {"pool_act": "relu"}, "pool_act 'relu' is not supported"),
    ],
)
def test_configs_are_refused_by_their_own_field_names(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    layout = LAYOUTS[family][0]
    folder = tiny_family(tmp_path, family, layout=layout)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})
    with pytest.raises(InvalidModel, match=message) as caught:
        check_checkpoint(folder)
    assert caught.value.pointer == "config.json"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        # The weights hold what the config does not ask for, or the other way round.
        ("ernie", {"use_task_id": False}, "unexpected parameters: .*task_type_embeddings"),
        ("ernie", {"type_vocab_size": 0}, "unexpected parameters: .*token_type_embeddings"),
        ("electra", {"embedding_size": 32}, "unexpected parameters: .*embeddings_project"),
        ("electra", {"embedding_size": 8}, "mis-shaped"),
        ("roberta", {"max_position_embeddings": 64}, "position_embeddings.* has the shape"),
        ("distilbert", {"hidden_dim": 65}, "lin1.* has the shape"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_family(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})
    with pytest.raises(InvalidModel, match=message):
        check_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    write_json(folder / "config.json", config)
    save_file({**weights, "adapter.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(InvalidModel, match=r"unexpected parameters .*'adapter\.weight'"):
        check_checkpoint(folder)


def test_a_roberta_without_the_dense_layer_of_its_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "roberta")
    edited(folder, lambda w: w.pop("classifier.dense.bias"))
    with pytest.raises(InvalidModel, match=r"missing parameters: 'pooler\.bias'"):
        read_checkpoint(folder)
