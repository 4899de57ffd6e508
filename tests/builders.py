"""Tiny real inputs for tests: random model folders and datasets, with numpy and no paddle."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

Arrays = dict[str, npt.NDArray[Any]]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD_WORDS = ("good", "great", "fine", "lovely", "bright", "warm", "clever", "moving")
BAD_WORDS = ("bad", "poor", "dull", "weak", "cold", "slow", "empty", "clumsy")
PLAIN_WORDS = (
    "the", "a", "this", "film", "story", "scene", "actor", "music", "is", "was", "and", "with",
    "very", "quite", "some", "of", "in", "at", "end", "start", "plot", "song", "camera", "light",
)  # fmt: skip
PIECES = ("##s", "##ed", "##ly", ".", ",", "!")
CHINESE_PLACE = ("\u5317", "\u4eac")
CHINESE = (*CHINESE_PLACE, "\u8c01", "\u4e2d", "\u56fd")
WORDS = (*GOOD_WORDS, *BAD_WORDS, *PLAIN_WORDS, *PIECES)


def tiny_bert(
    folder: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 32,
    ffn: int = 64,
    num_labels: int | None = 2,
    words: tuple[str, ...] = WORDS,
    max_positions: int = 64,
    prefix: str = "bert.",
    dtype: str = "float32",
    labels: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Path:
    """A random BERT in Hugging Face's layout, with vocab.txt and tokenizer_config.json.

    Without `num_labels` it has no classifier, and `prefix` is "" as BertModel saves it.
    `labels` become the config's id2label.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = (*SPECIAL_TOKENS, *words)
    config = bert_config(
        vocab_size=len(vocabulary),
        layers=layers,
        heads=heads,
        hidden=hidden,
        ffn=ffn,
        num_labels=num_labels,
        max_positions=max_positions,
        labels=labels,
    )
    write_json(folder / "config.json", config)
    weights = huggingface_weights(config, num_labels=num_labels, seed=seed)
    if num_labels is None:
        prefix = ""
    stored = {
        name if name.startswith("classifier") else prefix + name: array.astype(dtype)
        for name, array in weights.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, vocabulary)
    return folder


def with_token_head(folder: Path, head: str) -> Path:
    """Makes a `tiny_bert` with a classifier one that transformers saves as "BertFor<head>".

    TokenClassification or QuestionAnswering: no pooler, and the latter's own parameter name.
    """
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "architectures": [f"BertFor{head}"]})
    weights = load_file(folder / "model.safetensors")
    own = "qa_outputs" if head == "QuestionAnswering" else "classifier"
    stored = {
        name.replace("classifier", own): array
        for name, array in weights.items()
        if "pooler" not in name
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_paddlenlp(
    folder: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 32,
    ffn: int = 64,
    num_labels: int | None = 2,
    words: tuple[str, ...] = WORDS,
    max_positions: int = 64,
    weights_file: str = "model_state.pdparams",
    seed: int = 0,
) -> Path:
    """The same random BERT as `tiny_bert` of the same arguments, in PaddleNLP's layout.

    `weights_file` "model_state.pdparams" is a pickle of numpy arrays, as paddle.save
    writes it; "model.safetensors" has PaddleNLP's names too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = (*SPECIAL_TOKENS, *words)
    config = bert_config(
        vocab_size=len(vocabulary),
        layers=layers,
        heads=heads,
        hidden=hidden,
        ffn=ffn,
        num_labels=num_labels,
        max_positions=max_positions,
    )
    write_json(folder / "config.json", {**config, "pool_act": "tanh", "fuse": False})
    weights = paddlenlp_weights(huggingface_weights(config, num_labels=num_labels, seed=seed))
    if weights_file.endswith(".safetensors"):
        save_file(weights, folder / weights_file, metadata={"format": "np"})
    else:
        (folder / weights_file).write_bytes(pickle.dumps(weights, protocol=4))
    _write_tokenizer(folder, vocabulary)
    return folder


# Each family's class names in both toolkits, and what its config has beyond BERT's.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "tinybert": ("TinyBert", {}),
    "roberta": (
        "Roberta",
        {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    ),
    "ernie": (
        "Ernie",
        {
            "hidden_act": "relu",
            "type_vocab_size": 4,
            "use_task_id": True,
            "task_type_vocab_size": 3,
            "task_id": 2,
        },
    ),
    "electra": ("Electra", {"embedding_size": 16}),
    "distilbert": ("DistilBert", {}),
}
_DISTILBERT_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_DISTILBERT_NAMES = (
    ("encoder.layer.", "transformer.layer."),
    ("attention.self.query", "attention.q_lin"),
    ("attention.self.key", "attention.k_lin"),
    ("attention.self.value", "attention.v_lin"),
    ("attention.output.dense", "attention.out_lin"),
    ("attention.output.LayerNorm", "sa_layer_norm"),
    ("intermediate.dense", "ffn.lin1"),
    ("output.dense", "ffn.lin2"),
    ("output.LayerNorm", "output_layer_norm"),
)


def tiny_family(
    folder: Path,
    family: str,
    *,
    layout: str = "huggingface",
    num_labels: int | None = 2,
    words: tuple[str, ...] = WORDS,
    max_tokens: int = 64,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A random model of any family in one toolkit's layout, with a tokenizer of its own.

    The weights, [in, out] or [out, in], are the same in both layouts. `changes` go into the
    config. Without `num_labels` there is no classifier, no prefix, and a pooler only where
    the family's bare model has one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = byte_tokens(words) if family == "roberta" else (*SPECIAL_TOKENS, *words)
    class_name, own = FAMILIES[family]
    config = {
        **bert_config(vocab_size=len(vocabulary), num_labels=num_labels, max_positions=max_tokens),
        "model_type": family,
        "architectures": [
            f"{class_name}{'Model' if num_labels is None else 'ForSequenceClassification'}"
        ],
        **own,
        **changes,
    }
    if family == "roberta":
        config["max_position_embeddings"] += config["pad_token_id"] + 1
    weights = family_weights(family, config, layout=layout, num_labels=num_labels, seed=seed)
    if family == "distilbert":
        del config["type_vocab_size"]
        if layout == "huggingface":
            config = {_DISTILBERT_FIELDS.get(name, name): value for name, value in config.items()}
    write_json(folder / "config.json", config)
    save_file(weights, folder / "model.safetensors")
    if family == "roberta":
        write_byte_tokenizer(folder, words)
    else:
        _write_tokenizer(folder, vocabulary)
    return folder


def family_weights(
    family: str, config: dict[str, Any], *, layout: str, num_labels: int | None, seed: int = 0
) -> Arrays:
    """The weights of `tiny_family` by the names of one toolkit; `config` has BERT's fields."""
    weights = huggingface_weights(config, num_labels=num_labels, seed=seed)
    generator = np.random.default_rng(seed + 1)
    hidden = config["hidden_size"]
    if family == "ernie" and config["use_task_id"]:
        table = generator.normal(0, 0.3, (config["task_type_vocab_size"], hidden))
        weights["embeddings.task_type_embeddings.weight"] = table.astype(np.float32)
    if family == "electra" and config["embedding_size"] != hidden:
        projection = generator.normal(0, 0.2, (hidden, config["embedding_size"]))
        weights["embeddings_project.weight"] = projection.astype(np.float32)
        weights["embeddings_project.bias"] = generator.normal(0, 0.1, hidden).astype(np.float32)
    if family == "distilbert":
        del weights["embeddings.token_type_embeddings.weight"]
    if num_labels is None and family in ("electra", "distilbert"):
        del weights["pooler.dense.weight"], weights["pooler.dense.bias"]
    renamed: Arrays = {}
    for name, array in weights.items():
        if layout == "paddlenlp":
            name, array = _as_paddlenlp(name, array)
        elif family == "distilbert":
            for berts, own in _DISTILBERT_NAMES:
                name = name.replace(berts, own)
        head = name.startswith("classifier")
        if num_labels is not None and family in ("roberta", "electra", "distilbert"):
            head = head or name.startswith("pooler")
            if family == "distilbert":
                name = name.replace("pooler.dense", "pre_classifier")
            else:
                name = name.replace("classifier.", "classifier.out_proj.")
                name = name.replace("pooler.dense", "classifier.dense")
        renamed[name if head or num_labels is None else f"{family}.{name}"] = array
    return renamed


def bert_config(
    *,
    vocab_size: int,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 32,
    ffn: int = 64,
    num_labels: int | None = 2,
    max_positions: int = 64,
    labels: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """A config.json as Hugging Face writes it."""
    config: dict[str, Any] = {
        "architectures": ["BertModel" if num_labels is None else "BertForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": max_positions,
        "model_type": "bert",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": vocab_size,
    }
    if num_labels is not None and (labels is not None or num_labels != 2):
        names = labels or tuple(f"LABEL_{i}" for i in range(num_labels))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
    return config


def huggingface_weights(config: dict[str, Any], *, num_labels: int | None, seed: int = 0) -> Arrays:
    """Random weights under transformers' names without a prefix; linear weights are [out, in].

    Scaled so that activations neither vanish nor saturate: logits differ between texts.
    """
    generator = np.random.default_rng(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    width = config.get("embedding_size", hidden)
    weights: Arrays = {}

    def table(name: str, rows: int) -> None:
        weights[f"{name}.weight"] = generator.normal(0, 0.3, (rows, width))

    def norm(name: str, size: int = hidden) -> None:
        weights[f"{name}.weight"] = 1 + generator.normal(0, 0.1, size)
        weights[f"{name}.bias"] = generator.normal(0, 0.1, size)

    def linear(name: str, inputs: int, outputs: int) -> None:
        weights[f"{name}.weight"] = generator.normal(0, inputs**-0.5, (outputs, inputs))
        weights[f"{name}.bias"] = generator.normal(0, 0.1, outputs)

    table("embeddings.word_embeddings", config["vocab_size"])
    table("embeddings.position_embeddings", config["max_position_embeddings"])
    table("embeddings.token_type_embeddings", config["type_vocab_size"])
    norm("embeddings.LayerNorm", width)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, ffn)
        linear(f"{layer}.output.dense", ffn, hidden)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    if num_labels is not None:
        linear("classifier", hidden, num_labels)
    return {name: array.astype(np.float32) for name, array in weights.items()}


_PADDLENLP_NAMES = (
    ("embeddings.LayerNorm", "embeddings.layer_norm"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.self.query", "self_attn.q_proj"),
    ("attention.self.key", "self_attn.k_proj"),
    ("attention.self.value", "self_attn.v_proj"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "linear1"),
    ("output.dense", "linear2"),
    ("output.LayerNorm", "norm2"),
)


def paddlenlp_weights(huggingface: Arrays) -> Arrays:
    """The same weights under PaddleNLP's names; linear weights become [in, out]."""
    headless = "classifier.weight" not in huggingface
    renamed: Arrays = {}
    for name, array in huggingface.items():
        name, array = _as_paddlenlp(name, array)
        renamed[name if headless or name.startswith("classifier") else f"bert.{name}"] = array
    return renamed


def _as_paddlenlp(name: str, array: npt.NDArray[np.float32]) -> tuple[str, npt.NDArray[np.float32]]:
    if array.ndim == 2 and not name.startswith("embeddings."):
        array = np.ascontiguousarray(array.T)
    for theirs, paddles in _PADDLENLP_NAMES:
        name = name.replace(theirs, paddles)
    return name, array


def tiny_dataset(
    folder: Path,
    *,
    rows: dict[str, int] | None = None,
    labels: tuple[str, str] = ("0", "1"),
    pair: bool = False,
    seed: int = 0,
) -> Path:
    """train.tsv, dev.tsv and test.tsv with the columns text (text_pair) and label.

    Each text holds good words or bad ones among plain words, and its label says which:
    a model that learns the words gets every row right. With `pair`, the telling words
    stand in the second sentence. `rows` gives the rows of each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    for split, count in (rows or {"train": 256, "dev": 64, "test": 64}).items():
        header = "text\ttext_pair\tlabel" if pair else "text\tlabel"
        lines = [header]
        for i in range(count):
            label = i % 2  # balanced, whatever the seed
            telling = _sentence(chooser, GOOD_WORDS if label else BAD_WORDS)
            cells = [_sentence(chooser, ()), telling] if pair else [telling]
            lines.append("\t".join([*cells, labels[label]]))
        body = lines[1:]
        chooser.shuffle(body)
        (folder / f"{split}.tsv").write_text("\n".join([header, *body]) + "\n", encoding="utf-8")
    return folder


def tiny_tags(folder: Path, *, rows: dict[str, int], seed: int = 0) -> Path:
    """train.jsonl and so on with the columns tokens and tags: good words are B-GOOD, others O.

    Each row also has a Chinese place of two words, B-LOC and I-LOC.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    for split, count in rows.items():
        lines = []
        for _ in range(count):
            words = [*_sentence(chooser, GOOD_WORDS).split(), *CHINESE_PLACE]
            tags = ["B-GOOD" if word in GOOD_WORDS else "O" for word in words[:-2]]
            lines.append({"tokens": words, "tags": [*tags, "B-LOC", "I-LOC"]})
        _write_lines(folder / f"{split}.jsonl", lines)
    return folder


def tiny_questions(folder: Path, *, rows: dict[str, int], seed: int = 0) -> Path:
    """train.jsonl and so on in SQuAD's layout: "which good" asks for the context's good word.

    Every third question is Chinese and asks for the place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    for split, count in rows.items():
        lines = []
        for i in range(count):
            good = chooser.choice(GOOD_WORDS)
            context = (
                f"{_sentence(chooser, (good,))} {''.join(CHINESE_PLACE)} {PLAIN_WORDS[i % 9]}."
            )
            question, answer = ("\u8c01", "".join(CHINESE_PLACE)) if i % 3 == 0 else ("this", good)
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            lines.append({"question": question, "context": context, "answers": answers})
        _write_lines(folder / f"{split}.jsonl", lines)
    return folder


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")


def _sentence(chooser: random.Random, telling: tuple[str, ...]) -> str:
    words = chooser.choices(PLAIN_WORDS, k=chooser.randint(3, 12))
    for word in chooser.sample(telling, k=min(2, len(telling))):
        words.insert(chooser.randint(0, len(words)), word)
    return " ".join(words)


def _write_tokenizer(folder: Path, vocabulary: tuple[str, ...]) -> None:
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 64},
    )


def byte_tokens(words: tuple[str, ...]) -> tuple[str, ...]:
    """A byte-level vocabulary: special tokens, every byte, and the beginnings of " word"."""
    alphabet = sorted(ByteLevel.alphabet())
    merged = ["".join(pair) for pair in _merges(words)]
    return ("<s>", "<pad>", "</s>", "<unk>", *alphabet, *merged, "<mask>")


def write_byte_tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """RoBERTa's vocab.json and merges.txt."""
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(byte_tokens(words))})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in _merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """What joins the letters of each word, and the space before it, from left to right."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words:
        if word.isascii() and word.isalpha():
            spelt = f"\u0120{word}"  # byte-level BPE's sign for a space
            pairs.update(dict.fromkeys((spelt[:i], spelt[i]) for i in range(1, len(spelt))))
    return list(pairs)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def device_profile(
    *,
    hidden: int = 32,
    head_dim: int = 8,
    layers: int = 2,
    heads: tuple[int, ...] = (1, 4),
    ffn: tuple[int, ...] = (16, 64),
    batch_size: tuple[int, ...] = (1,),
    seq_len: tuple[int, ...] = (4, 64),
    threads: tuple[int, ...] = (1,),
    formats: tuple[str, ...] = ("onnx",),
    off: tuple[float, ...] = (0.05, -0.02),
) -> dict[str, Any]:
    """A device on which a call takes a millisecond, and each head and each ten neurons of a layer
    one more for ten tokens of a row: divided by threads, and by 4 in int8. Of `tiny_bert`, unless
    told otherwise.

    Predictions are off by `off` on its whole networks.
    """
    tables, networks = [], []
    for fmt, rows, tokens, cores in itertools.product(formats, batch_size, seq_len, threads):
        each = rows * tokens / 10 / cores / (1 if fmt == "onnx" else 4)
        setting = {"batch_size": rows, "seq_len": tokens, "threads": cores, "format": fmt}
        costs: dict[str, dict[str, float]] = {
            "attention": {str(count): count * each for count in heads},
            "ffn": {str(count): count / 10 * each for count in ffn},
        }
        if fmt not in [table["format"] for table in tables]:
            widest = 1.0 + layers * (heads[-1] + ffn[-1] / 10) * each
            networks += [
                {
                    **setting,
                    "heads": [heads[-1]] * layers,
                    "ffn": [ffn[-1]] * layers,
                    "head": "sequence",
                    "measured_ms": widest / (1 + error),
                    "served": False,
                }
                for error in off
            ]
        beside = {"embeddings": 0.0, "pooled_head": 0.0, "token_head": 0.5}
        tables.append({**setting, "call": 1.0, **beside, **costs})
    return {
        "widthwise_profile": 3,
        "device": {
            "cpu": "Test Board rev 3",
            "cores": 4,
            "threads": 4,
            "instruction_sets": ["asimd"],
            "memory_bytes": 2**30,
            "gpus": [],
            "platform": "Linux-6.1-aarch64",
            "python": "3.11.2",
            "libraries": {"onnxruntime": "1.32.0", "numpy": "1.26.4"},
        },
        "shape": {
            "hidden": hidden,
            "head_dim": head_dim,
            "vocab_size": 60,
            "labels": 2,
            "embedding_size": None,
            "activation": "gelu",
        },
        "layers": layers,
        "rounds": 5,
        "tables": tables,
        "networks": networks,
    }


_TORCH_STORAGES = {
    "<f4": "FloatStorage",
    "<f2": "HalfStorage",
    "<f8": "DoubleStorage",
    "<i8": "LongStorage",
}


def torch_zip(path: Path, weights: Arrays, *, as_parameters: bool = False) -> Path:
    """What torch.save writes for a state dict: a zip with data.pkl and a file for each storage.

    The pickle is put together opcode by opcode, because torch itself is not installed.
    """
    pickled = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, array) in enumerate(weights.items()):
        pickled += _pickled_text(name)
        tensor = bytearray(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        tensor += _pickled_text("storage")
        tensor += f"ctorch\n{_TORCH_STORAGES[array.dtype.str]}\n".encode()
        tensor += _pickled_text(str(key)) + _pickled_text("cpu") + _pickled_int(array.size) + b"tQ"
        strides = [step // array.itemsize for step in np.require(array, requirements="C").strides]
        tensor += _pickled_int(0) + b"(" + b"".join(map(_pickled_int, array.shape)) + b"t"
        tensor += b"(" + b"".join(map(_pickled_int, strides)) + b"t"
        tensor += b"\x89ccollections\nOrderedDict\n)RtR"
        if as_parameters:
            hooks = b"\x88ccollections\nOrderedDict\n)RtR"
            tensor = bytearray(b"ctorch._utils\n_rebuild_parameter\n(") + tensor + hooks
        pickled += tensor
    # torch hangs the modules' versions on the dict: its state.
    pickled += b"u}" + _pickled_text("_metadata") + b"ccollections\nOrderedDict\n)Rsb."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", bytes(pickled))
        file.writestr("archive/byteorder", "little")
        for key, array in enumerate(weights.values()):
            file.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        file.writestr("archive/version", "3\n")
    return path


def _pickled_text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _pickled_int(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)
