#!/usr/bin/env python3
"""Ask the model of this folder about texts.

    python predict.py "first text" "second text" ...
    python predict.py --json "a text"
    python predict.py "a question" "its context" ...

A model of sentence pairs, or of questions, takes its texts two at a time. Prints each
text's label and its probability, its labels if it may have several, its score, or the
answer to each question; of a model that tags words a line with each word and its tag
(blanks set words apart, and each Chinese character is one). Needs numpy and tokenizers,
and onnxruntime for the ONNX files or paddlepaddle for the Paddle Inference one; nothing
else of the service that made it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
RUNTIMES = {
    "onnx": "onnxruntime",
    "onnx-int8-dynamic": "onnxruntime",
    "onnx-int8-static": "onnxruntime",
    "onnx-fp16": "onnxruntime",
    "paddle": "paddle",
    "paddle-bf16": "paddle",
}
PACKAGES = {"paddle": "paddlepaddle"}  # where the package to install has another name
BATCH_ROWS = 32
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{CHINESE}]|[^\\s{CHINESE}]+")


def refuse(message: str) -> NoReturn:
    sys.exit("predict.py: " + message)


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module, module)
        refuse(f"needs the package {package} ({error}); install it with: pip install {package}")


def need_file(name: str) -> Path:
    path = HERE / name
    if not path.is_file():
        refuse(f"{name} is missing from {HERE}; unpack the whole bundle and run predict.py there")
    return path


def read_manifest() -> dict[str, Any]:
    """The manifest, holding at least what is read of it below."""
    try:
        manifest = json.loads(need_file("manifest.json").read_text(encoding="utf-8"))
        task = manifest["task"]
        complete = (
            isinstance(manifest["files"], list)
            and all(isinstance(item["files"], list) for item in manifest["formats"].values())
            and isinstance(task["labels"], list)
            and task["kind"] in ANSWERS
            and {"text_pair", "max_seq_len", "pad_token_id"} <= task.keys()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"manifest.json cannot be read: {error!r}")
    if not complete:
        refuse("manifest.json cannot be read: it is not that of a bundle")
    return manifest  # type: ignore[no-any-return]


def check(manifest: dict[str, Any]) -> None:
    """Refuses when a file is not the one that was published."""
    for entry in manifest["files"]:
        digest = hashlib.sha256()
        with need_file(entry["path"]).open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
        if digest.hexdigest() != entry["sha256"]:
            refuse(f"{entry['path']} is damaged: its SHA-256 is not the manifest's")


def choose_format(manifest: dict[str, Any], wanted: str) -> str:
    """What the user names, else what the job chose, else the first that the bundle has."""
    offered = [name for name in RUNTIMES if name in manifest["formats"]]
    if wanted and wanted not in offered:
        refuse(f"this bundle has no {wanted} model; it has: {', '.join(manifest['formats'])}")
    if not offered:
        refuse("this bundle holds no model that can be served, only weights for further training")
    chosen = manifest.get("selected_format")
    return wanted or (chosen if chosen in offered else offered[0])


def load_onnx(files: dict[str, Path]) -> Callable[[dict[str, Any]], Any]:
    session = need("onnxruntime").InferenceSession(
        str(files["model.onnx"]), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(["logits"], {name: batch[name] for name in names})[0]


def load_paddle(files: dict[str, Path], *, bf16: bool = False) -> Callable[[dict[str, Any]], Any]:
    need("paddle")
    inference = need("paddle.inference")
    config = inference.Config(str(files["inference.json"]), str(files["inference.pdiparams"]))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    if bf16:  # in fp32 where the processor has no such instructions
        config.enable_mkldnn_bfloat16()
    predictor = inference.create_predictor(config)

    def run(batch: dict[str, Any]) -> Any:
        for name in predictor.get_input_names():  # not every model reads token types
            predictor.get_input_handle(name).copy_from_cpu(batch[name])
        predictor.run()
        return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()

    return run


def load(manifest: dict[str, Any], fmt: str) -> Callable[[dict[str, Any]], Any]:
    names = [entry["path"] for entry in manifest["formats"][fmt]["files"]]
    files = {Path(name).name: need_file(name) for name in names}
    if RUNTIMES[fmt] == "onnxruntime":
        return load_onnx(files)
    return load_paddle(files, bf16=fmt == "paddle-bf16")


def read_tokenizer() -> Any:
    tokenizer = need("tokenizers").Tokenizer.from_file(str(need_file("tokenizer/tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def logits_of(
    manifest: dict[str, Any], run: Callable[[dict[str, Any]], Any], rows: list[Any]
) -> Iterator[Any]:
    """The logits of each encoded row, BATCH_ROWS of them at a time, padded to the longest."""
    np = need("numpy")
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        shape = (len(part), max(len(row.ids) for row in part))
        ids = np.full(shape, manifest["task"]["pad_token_id"], np.int64)
        types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, row in enumerate(part):
            length = len(row.ids)
            ids[i, :length], types[i, :length], mask[i, :length] = row.ids, row.type_ids, 1
        yield from run({"input_ids": ids, "token_type_ids": types, "attention_mask": mask})


def one_label(np: Any, labels: list[str], logits: Any) -> dict[str, Any]:
    """Of a classification: the likeliest label, and every label's probability."""
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    best = int(probabilities.argmax())
    return {
        "label": labels[best],
        "probability": float(probabilities[best]),
        "probabilities": {label: float(p) for label, p in zip(labels, probabilities, strict=True)},
    }


def any_labels(np: Any, labels: list[str], logits: Any) -> dict[str, Any]:
    """Of a multi-label task: the labels with a probability above 1/2, and every probability."""
    probabilities = 1 / (1 + np.exp(-logits))
    return {
        "labels": [label for label, logit in zip(labels, logits, strict=True) if logit > 0],
        "probabilities": {label: float(p) for label, p in zip(labels, probabilities, strict=True)},
    }


def score(np: Any, labels: list[str], logits: Any) -> dict[str, Any]:
    """Of a regression: the one output."""
    return {"score": float(logits[0])}


def judge(manifest: dict[str, Any], fmt: str, texts: list[str]) -> Iterator[dict[str, Any]]:
    """One answer a text, or a pair of them."""
    np = need("numpy")
    task = manifest["task"]
    read = {"classification": one_label, "multi_label": any_labels, "regression": score}
    tokenizer = read_tokenizer()
    tokenizer.enable_truncation(max_length=task["max_seq_len"], strategy="longest_first")
    rows: list[Any] = list(texts)
    if task["text_pair"]:
        rows = list(zip(texts[::2], texts[1::2], strict=True))
    for logits in logits_of(manifest, load(manifest, fmt), tokenizer.encode_batch(rows)):
        yield read[task["kind"]](np, task["labels"], logits)


def tag(manifest: dict[str, Any], fmt: str, texts: list[str]) -> Iterator[dict[str, Any]]:
    """The words of each text with their tags; null where a word was cut off."""
    labels = manifest["task"]["labels"]
    tokenizer = read_tokenizer()
    tokenizer.enable_truncation(max_length=manifest["task"]["max_seq_len"])
    rows = [WORD.findall(text) for text in texts]
    encoded = tokenizer.encode_batch(rows, is_pretokenized=True)
    run = load(manifest, fmt)
    for words, row, logits in zip(rows, encoded, logits_of(manifest, run, encoded), strict=True):
        tags = [None] * len(words)
        for position, word in reversed(list(enumerate(row.word_ids))):
            if word is not None:  # a word's first token, which is met last, has its tag
                tags[word] = labels[int(logits[position].argmax())]
        yield {"words": words, "tags": tags}


def answer(manifest: dict[str, Any], fmt: str, texts: list[str]) -> Iterator[dict[str, Any]]:
    """The best answer to each question in the windows of its context."""
    task = manifest["task"]
    tokenizer = read_tokenizer()
    run = load(manifest, fmt)
    longest = task["max_seq_len"] // 2  # of a question
    for question, context in zip(texts[::2], texts[1::2], strict=True):
        tokenizer.no_truncation()
        alone = tokenizer.encode(question, add_special_tokens=False)
        if len(alone) > longest:
            question = question[: alone.offsets[longest - 1][1]]
        tokenizer.enable_truncation(
            max_length=task["max_seq_len"], stride=task["overlap"], strategy="only_second"
        )
        whole = tokenizer.encode(question, context)
        windows = [whole, *whole.overflowing]
        found = [
            best_span(logits, window, task["max_answer_length"])
            for logits, window in zip(logits_of(manifest, run, windows), windows, strict=True)
        ]
        score, first, last = max(found)
        yield {"answer": context[first:last], "probability": float(need("numpy").exp(score))}


def best_span(logits: Any, window: Any, longest: int) -> tuple[float, int, int]:
    """(log probability, first character, end) of the best answer of `longest` tokens at most.

    The probabilities are over the tokens of the context and [CLS], as in training.
    """
    np = need("numpy")
    tokens = [i for i, sequence in enumerate(window.sequence_ids) if sequence == 1]
    scores = logits[[0, *tokens]].astype(np.float64)
    scores = (scores - np.logaddexp.reduce(scores, axis=0))[1:]
    best = (-np.inf, 0, 0)
    for length in range(min(longest, len(tokens))):
        both = scores[: len(tokens) - length, 0] + scores[length:, 1]
        start = int(both.argmax())
        if both[start] > best[0]:
            first, last = window.offsets[tokens[start]], window.offsets[tokens[start + length]]
            best = (float(both[start]), first[0], last[1])
    return best


ANSWERS = {
    "classification": judge,
    "multi_label": judge,
    "regression": judge,
    "token_classification": tag,
    "question_answering": answer,
}


def in_words(result: dict[str, Any], given: list[str]) -> str:
    """One answer as a line, or of tags a line a word and an empty one."""
    if "tags" in result:
        pairs = zip(result["words"], result["tags"], strict=True)
        return "\n".join(f"{word}\t{tag or '(cut off)'}" for word, tag in pairs) + "\n"
    for name in ("label", "answer"):
        if name in result:
            return f"{result[name]}\t{result['probability']:.4f}\t{' | '.join(given)}"
    found = ", ".join(result["labels"]) if "labels" in result else f"{result['score']:.4f}"
    return f"{found}\t{' | '.join(given)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="for pairs: TEXT PAIR TEXT PAIR ..."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    parser.add_argument(
        "--format",
        choices=sorted(RUNTIMES),
        default="",
        help="default: the one that the job chose, else the first that the bundle has",
    )
    parser.add_argument("--check", action="store_true", help="first compare every file's SHA-256")
    arguments = parser.parse_args()
    manifest = read_manifest()
    task = manifest["task"]
    if arguments.check:
        check(manifest)
    if not arguments.texts and not arguments.check:
        parser.error("give at least one text")
    if task["text_pair"] and len(arguments.texts) % 2:
        parser.error("this model reads two texts together: give them in pairs")
    if not arguments.texts:
        print(f"all {len(manifest['files'])} files are as published")
        return
    fmt = choose_format(manifest, arguments.format)
    step = 2 if task["text_pair"] else 1
    answers = ANSWERS[task["kind"]](manifest, fmt, arguments.texts)
    for i, result in enumerate(answers):
        given = arguments.texts[i * step : (i + 1) * step]
        if arguments.json:
            shown = {"text": given[0], **({"text_pair": given[1]} if step == 2 else {}), **result}
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print(in_words(result, given))


if __name__ == "__main__":
    main()
