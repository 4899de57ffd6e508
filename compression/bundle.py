"""The download of one sub-network: a .tar.gz that runs and explains itself.

    <name>/manifest.json     spec, provenance, metrics, SHA-256 and size of each file
    <name>/manifest.schema.json    its JSON Schema
    <name>/signature.json    of the manifest, where the installation has a signing key
    <name>/MODEL_CARD.md     the same for people
    <name>/regression.json   its answers against the teacher's, by groups of rows
    <name>/predict.py        runs it without this service
    <name>/onnx|paddle|safetensors/...
    <name>/tokenizer/...

The same inputs give the same bytes: names are sorted, and no clock is read.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compression.device_profile import in_words
from compression.export import EXPORTERS, INPUTS, OUTPUT, sha256_of
from compression.manifest import (
    MANIFEST,
    SCHEMA,
    SIGNATURE,
    VERSION,
    AllMetrics,
    Figures,
    Manifest,
    ManifestFormat,
    ManifestMetrics,
    ManifestProvenance,
    ManifestSubnetwork,
    ManifestTask,
    Provenance,
    Tensor,
    fingerprint,
    to_bytes,
)
from compression.regression import RegressionReport, Regressions
from compression.report import (
    METRIC_NAMES,
    DatasetReport,
    FileReport,
    FormatReport,
    Intervals,
    SubnetworkReport,
    TeacherReport,
    TrainingReport,
    VocabularyReport,
)
from compression.selection import FORMAT_NAMES, SHOWN_CONFIDENCE
from compression.signing import sign
from compression.spec import (
    INT8_FORMATS,
    SERVED_FORMATS,
    Format,
    LatencySetting,
    Spec,
    TaskSpec,
    fp32_format,
)
from compression.vocabulary import MAP_FILE

GZIP_LEVEL = 1  # trained weights hardly compress: 8 % here, 9 % at level 6
KIND_NAMES = {  # what the model of a task is called
    "classification": "classifier",
    "multi_label": "multi-label classifier",
    "regression": "regression model",
    "token_classification": "tagger of words",
    "question_answering": "model that finds answers",
}
TEACHER = "teacher"  # as ComparisonOnTest.reference has it
CARD_GROUPS = 10  # of each kind that the card shows
PREDICT_SOURCE = Path(__file__).with_name("bundle_predict.py")


@dataclass(frozen=True)
class BundleFacts:
    """What the manifest and the card say. Labels are in the order of the outputs."""

    spec: Spec
    dataset: DatasetReport
    teacher: TeacherReport
    subnetwork: SubnetworkReport
    provenance: Provenance
    environment: Mapping[str, str]
    pad_token_id: int
    inputs: tuple[str, ...] = INPUTS
    trainings: Mapping[str, TrainingReport] = field(default_factory=dict)
    reorder_max_abs: float | None = None
    selected_format: Format | None = None  # where this sub-network was chosen
    vocabulary: VocabularyReport | None = None  # what was removed of it


def input_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below `folder`, by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def write_bundle(
    out: Path,
    facts: BundleFacts,
    *,
    subnetwork_dir: Path,
    tokenizer_files: Sequence[Path],
    signing_key: Ed25519PrivateKey | None = None,
) -> FileReport:
    """Writes `out` (atomically) from the published files below `subnetwork_dir`.

    With `signing_key` there is a signature.json of the manifest, and through it of every file.
    `tokenizer_files` must hold a tokenizer.json. FileNotFoundError where a file that
    the report names is not there; nothing is written then.
    """
    if not any(path.name == "tokenizer.json" for path in tokenizer_files):
        raise FileNotFoundError("a bundle needs a tokenizer.json, and none was given")
    stored: dict[str, Path] = {
        file.path: subnetwork_dir / file.path for file in _published_files(facts.subnetwork)
    }
    stored |= {f"tokenizer/{path.name}": path for path in tokenizer_files}
    written = {
        "MODEL_CARD.md": model_card(facts).encode(),
        "predict.py": PREDICT_SOURCE.read_bytes(),
        SCHEMA.name: SCHEMA.read_bytes(),
    }
    if facts.subnetwork.regression is not None:
        written["regression.json"] = to_bytes(
            Regressions(dev=facts.subnetwork.regression, test=facts.subnetwork.test_regression)
        )
    known = {file.path: file for file in _published_files(facts.subnetwork)}
    files = [known.get(name) or _file_report(name, path) for name, path in stored.items()]
    files += [
        FileReport(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in written.items()
    ]
    manifest = build_manifest(facts, sorted(files, key=lambda file: file.path))
    written[MANIFEST] = to_bytes(manifest)
    if signing_key is not None:
        written[SIGNATURE] = to_bytes(sign(written[MANIFEST], signing_key))
    _write_archive(out, facts.subnetwork.name, stored, written)
    return _file_report(out.name, out)


def build_manifest(facts: BundleFacts, files: Sequence[FileReport]) -> Manifest:
    """The manifest of a bundle with these files."""
    subnetwork, teacher, dataset = facts.subnetwork, facts.teacher, facts.dataset
    task = facts.spec.task
    windows = task.kind == "question_answering"
    length = ("length",) if task.head == "token" else ()
    return Manifest(
        widthwise_bundle=VERSION,
        name=subnetwork.name,
        selected_format=facts.selected_format,
        task=ManifestTask(
            kind=task.kind,
            text=dataset.text,
            text_pair=dataset.text_pair,
            labels=dataset.label_names,
            max_seq_len=task.max_seq_len,
            pad_token_id=facts.pad_token_id,
            overlap=task.overlap if windows else None,
            max_answer_length=task.max_answer_length if windows else None,
        ),
        inputs=tuple(
            Tensor(name=name, dtype="int64", shape=("batch", "length")) for name in facts.inputs
        ),
        output=Tensor(  # named so in ONNX; Paddle Inference numbers its one output
            name=OUTPUT, dtype="float32", shape=("batch", *length, len(dataset.label_names))
        ),
        formats={
            report.format: ManifestFormat(
                **dict(report), run_with=dict(EXPORTERS[report.format].describe())
            )
            for report in subnetwork.formats
            if report.published
        },
        metrics=ManifestMetrics(
            metric=task.main_metric,
            teacher=Figures(dev=teacher.accuracy, test=teacher.test_accuracy),
            subnetwork=Figures(dev=subnetwork.accuracy, test=subnetwork.test_accuracy),
            all_on_dev=AllMetrics(teacher=teacher.metrics, subnetwork=subnetwork.metrics),
            accuracy_drop_points=subnetwork.accuracy_drop,
            accuracy_drop_intervals=subnetwork.accuracy_drop_intervals,
            on_test=subnetwork.test,
            parameters=subnetwork.parameters,
            teacher_parameters=teacher.parameters,
            flops=subnetwork.flops,
        ),
        subnetwork=ManifestSubnetwork(
            width_mult=str(subnetwork.width_mult) if subnetwork.width_mult else None,
            depth_mult=str(subnetwork.depth_mult),
            layers=subnetwork.layers,
            heads=subnetwork.heads,
            ffn=subnetwork.ffn,
        ),
        vocabulary=facts.vocabulary,
        provenance=ManifestProvenance(
            **dict(facts.provenance),
            rows=dataset.rows,
            notes=dataset.notes,
            seed=facts.spec.seed,
            environment=facts.environment,
            device_fingerprint=fingerprint(facts.environment),
        ),
        spec=facts.spec.model_dump(mode="json"),
        files=tuple(files),
    )


def model_card(facts: BundleFacts) -> str:
    """The card, in Markdown: what it is, from what, how good, how fast, and what it is not."""
    subnetwork, teacher, dataset = facts.subnetwork, facts.teacher, facts.dataset
    metric = METRIC_NAMES[facts.spec.task.main_metric]
    pair = f" and {_code(dataset.text_pair)}" if dataset.text_pair else ""
    parts = [
        f"# {subnetwork.name}: a {teacher.family} {KIND_NAMES[facts.spec.task.kind]} at "
        f"{_size(subnetwork)}",
        f"It reads {_code(dataset.text)}{pair} and answers with {_answer(facts)}. "
        f"It is the sub-network of {_size(subnetwork)} of a supernet that was distilled "
        "from the uploaded model with DynaBERT's method (arXiv:2004.04037, width "
        f"{'and depth stages' if facts.spec.supernet.has_depth else 'stage'}, without data "
        "augmentation).",
        "## How good it is",
        _table(
            ("", "this model", "teacher"),
            [
                (f"{metric} on dev", _figure(subnetwork.accuracy), _figure(teacher.accuracy)),
                (
                    f"{metric} on test",
                    _figure(subnetwork.test_accuracy),
                    _figure(teacher.test_accuracy),
                ),
                *(
                    (f"{METRIC_NAMES[name]} on dev", _figure(value), _figure(teacher.metrics[name]))
                    for name, value in subnetwork.metrics.items()
                    if name != facts.spec.task.main_metric
                ),
                ("parameters", f"{subnetwork.parameters:,}", f"{teacher.parameters:,}"),
            ],
        ),
        _drop(subnetwork, metric),
        _test_words(subnetwork, metric),
        _vocabulary_words(facts.vocabulary),
        *_regression_parts(subnetwork),
        "## How fast it is, and whether the files agree",
        _table(
            (
                "format",
                "size (MB)",
                "p50 (ms)",
                "p95 (ms)",
                "p99 (ms)",
                "speed-up against the teacher",
                "largest logit difference",
            ),
            [_format_row(report) for report in subnetwork.formats],
        ),
        _latency_words(subnetwork.formats, facts.environment),
        *_prediction_words(subnetwork.formats),
        _baseline_words(teacher, metric),
        "The largest logit difference is between the file, reloaded in a fresh process, and the "
        "supernet it was cut from; a format above its tolerance is not in this bundle.",
        *_rounded_words(subnetwork.formats, metric, numbers=facts.spec.task.kind == "regression"),
        *_missing_formats(subnetwork.formats),
        "## How it was made",
        *_steps(facts),
        "## What it was made from",
        _table(
            ("input", "SHA-256"),
            [
                (f"{kind}: {_code(path)}", digest)
                for kind, digests in (
                    ("model", facts.provenance.model),
                    ("dataset", facts.provenance.dataset),
                )
                for path, digest in sorted(digests.items())
            ],
        ),
        f"Rows: {', '.join(f'{count} {split}' for split, count in dataset.rows.items())}. "
        f"Seed: {facts.spec.seed}. The whole specification is in `manifest.json`.",
        *(f"- {_plain(note)}" for note in dataset.notes),
        "## Limits",
        f"- This sub-network was {'' if subnetwork.selected else 'not '}chosen"
        f"{_in_format(facts.selected_format)}. The choice is made by {metric} on dev, so dev "
        "flatters the chosen one a little. Test, where there is one, is never used to choose, "
        "and only the chosen one is measured on it.",
        "- Figures are of one run with one seed, and their intervals cover the rows of the split "
        "and the rounds of the measurement alone: a difference within them may be noise.",
        f"- {metric[0].upper()}{metric[1:]} is of all rows together. Groups of rows are compared "
        "with the teacher alone, and only those above: name the columns that matter to you in "
        "the specification's `report.slices`.",
        f"- {_too_long(facts.spec.task)}",
        "- Whatever the uploaded model and the dataset got wrong, this model has learnt too. "
        "Their licences apply to it.",
        "## How to run it",
        _how_to_run(facts),
    ]
    text = "\n\n".join(part for part in parts if part)
    return re.sub(r"\n\n(?=- |[2-9]\. )", "\n", text) + "\n"


def _vocabulary_words(vocabulary: VocabularyReport | None) -> str:
    """What it reads of texts; empty where it has the teacher's vocabulary."""
    if vocabulary is None:
        return ""
    return (
        f"It knows {vocabulary.tokens_after:,} of the teacher's {vocabulary.tokens_before:,} "
        "tokens: those of the texts that it learnt from, and all single characters. On "
        f"{vocabulary.split}, {vocabulary.changed_texts:.1%} of the texts have a token that it "
        f"lacks; a text has {vocabulary.length_after:.1f} tokens on average, for the teacher "
        f"{vocabulary.length_before:.1f}, and {vocabulary.unk_after:.2%} of them are unknown, for "
        f"the teacher {vocabulary.unk_before:.2%}. All figures above are of this model with this "
        f"vocabulary. `tokenizer/{MAP_FILE}` says which token was which."
    )


def _regression_parts(subnetwork: SubnetworkReport) -> Iterator[str]:
    """What flipped against the teacher, in a sentence a split and a table for dev."""
    dev, test = subnetwork.regression, subnetwork.test_regression
    if dev is None:
        return
    yield "## Where it differs from the teacher"
    yield " ".join(_flips_words(report) for report in (dev, test) if report is not None)
    if any(report.published and report.flipped is not None for report in subnetwork.formats):
        own = subnetwork.test.format if subnetwork.test is not None else None
        of_test = f"; those on test are the {FORMAT_NAMES[own]} file's" if own is not None else ""
        yield (
            f"The answers on dev are the sub-network's in fp32{of_test}. How many of them each "
            "file that rounds flips is told below."
        )
    kinds = {"label": dev.by_label, "length": dev.by_length} | {
        _code(column): groups for column, groups in dev.by_column.items()
    }
    yield _table(
        ("groups of dev", f"{dev.unit}s", "alike", "right to wrong", "wrong to right"),
        [
            (
                f"{kind}: {_code(group.name)}",
                str(group.units),
                f"{group.agreement:.1%}",
                str(group.right_to_wrong),
                str(group.wrong_to_right),
            )
            for kind, groups in kinds.items()
            for group in groups[:CARD_GROUPS]
        ],
    )
    yield (
        f"At most {CARD_GROUPS} groups of a kind are shown; all of them, and the rows that lost "
        f"most, are in `regression.json`. {dev.rule[0].upper()}{dev.rule[1:]}."
    )


def _flips_words(report: RegressionReport) -> str:
    flips = report.overall
    return (
        f"On {report.split} it answers {flips.agreement:.1%} of {flips.units} {report.unit}s as "
        f"the teacher does; {flips.right_to_wrong} went from right to wrong, "
        f"{flips.wrong_to_right} from wrong to right."
    )


def _steps(facts: BundleFacts) -> list[str]:
    """The job's stages as a numbered list, with the settings that shaped them."""
    spec, teacher, subnetwork = facts.spec, facts.teacher, facts.subnetwork
    layers = int(len(subnetwork.heads) / subnetwork.depth_mult)
    is_width = subnetwork.width_mult is not None and subnetwork.depth_mult == 1
    moved = (
        f" At full width that moved no logit by more than {facts.reorder_max_abs:.1e}."
        if facts.reorder_max_abs is not None
        else ""
    )
    steps = [
        f"The teacher, of {layers} layers, was "
        + (
            f"fine-tuned for {teacher.fine_tuned_steps} steps on the dataset first."
            if teacher.fine_tuned_steps
            else "used as it was uploaded."
        ),
        f"Heads and neurons were scored on at most {spec.importance.rows} rows of "
        f"{spec.importance.split}, and the most important put first.{moved}",
        f"All widths ({', '.join(map(str, spec.supernet.width_mults))}) were distilled together"
        + (" by PaddleSlim's recipe" if spec.engine == "paddleslim" else "")
        + (", at most four a step" if spec.supernet.per_layer is not None else "")
        + f"{_training_words(facts, 'distil')}: batches of {spec.distillation.batch_size} rows, "
        f"learning rate {spec.distillation.learning_rate:g}, weights "
        f"{spec.distillation.lambda_rep:g} for hidden states and "
        f"{spec.distillation.lambda_logit:g} for logits.",
        *(
            [
                f"All depths ({', '.join(map(str, spec.supernet.depth_mults))}) of all widths were "
                f"then distilled{_training_words(facts, 'depth')} from what that made of the full "
                f"depth, at most four a step: batches of {spec.depth.batch_size} rows, "
                f"learning rate {spec.depth.learning_rate:g}, weights {spec.depth.lambda_rep:g} "
                f"and {spec.depth.lambda_logit:g}."
            ]
            if spec.supernet.has_depth
            else []
        ),
        *(
            [
                "All widths were then fine-tuned together on the labels of train"
                f"{_training_words(facts, 'final')}."
            ]
            if spec.final.when == "always"
            else []
        ),
        *(
            [
                "Sub-networks with a width for each layer were searched for: "
                f"{spec.supernet.per_layer.finalists} at most for each budget, the most accurate "
                "on rows of train that nothing was trained on, among those predicted to hold it. "
                "The supernet had learnt random widths for each layer along with the others."
            ]
            if spec.supernet.per_layer is not None
            else []
        ),
        f"This {'width' if is_width else 'sub-network'} was cut out: "
        f"{_kept(subnetwork)}{_each(subnetwork.heads)} heads and {_each(subnetwork.ffn)} "
        "neurons a layer."
        + (
            f" It was then distilled alone{_training_words(facts, alone)}: batches of "
            f"{spec.refinement.batch_size} rows, learning rate {spec.refinement.learning_rate:g}, "
            f"weights {spec.refinement.lambda_rep:g} and {spec.refinement.lambda_logit:g}."
            if (alone := f"refine {subnetwork.name}") in facts.trainings
            else ""
        )
        + (" Tokens that its data never uses were removed." if facts.vocabulary else "")
        + " It was judged on dev, written in each format, reloaded in a fresh "
        "process and compared.",
    ]
    return [f"{number}. {step}" for number, step in enumerate(steps, start=1)]


def _training_words(facts: BundleFacts, stage: str) -> str:
    training = facts.trainings.get(stage)
    if training is None:
        return ""
    ended = {
        "complete": "",
        "plateau": ", until nothing was gained",
        "time": ", until the time was up",
    }[training.ended]
    return f" for {training.steps} of {training.planned_steps} steps{ended}"


def _size(subnetwork: SubnetworkReport) -> str:
    """ "width 1/2", with the depth where that is not the full one."""
    depth = "" if subnetwork.depth_mult == 1 else f" and depth {subnetwork.depth_mult}"
    if subnetwork.width_mult is None:
        return f"a width for each layer{depth}"
    return f"width {subnetwork.width_mult}{depth}"


def _kept(subnetwork: SubnetworkReport) -> str:
    if subnetwork.depth_mult == 1:
        return ""
    return f"the layers {', '.join(map(str, subnetwork.layers))} (from 0), "


def _each(counts: Sequence[int]) -> str:
    """The one count of all layers, or one a layer."""
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _too_long(task: TaskSpec) -> str:
    if task.kind == "question_answering":
        return (
            f"A context is read in windows of {task.max_seq_len} tokens; a question longer than "
            f"half of one is cut. An answer has at most {task.max_answer_length} tokens."
        )
    return f"Inputs longer than {task.max_seq_len} tokens are cut."


def _answer(facts: BundleFacts) -> str:
    names = ", ".join(_code(label) for label in facts.dataset.label_names)
    count = len(facts.dataset.label_names)
    return {
        "classification": f"one of {count} labels: {names}",
        "multi_label": f"those of {count} labels that apply, which may be none: {names}",
        "regression": f"a score: {names}",
        "token_classification": f"a tag for each of its words, one of {count}: {names}",
        "question_answering": f"a passage of {_code(facts.dataset.text_pair or '')}",
    }[facts.spec.task.kind]


def _published_files(subnetwork: SubnetworkReport) -> list[FileReport]:
    return [file for report in subnetwork.formats if report.published for file in report.files]


def _file_report(name: str, path: Path) -> FileReport:
    return FileReport(path=name, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def _write_archive(
    out: Path, top: str, stored: Mapping[str, Path], written: Mapping[str, bytes]
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    scratch = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name in sorted({*stored, *written}):
                member = tarfile.TarInfo(f"{top}/{name}")  # mtime, uid and gid are 0
                member.mode = 0o755 if name == "predict.py" else 0o644
                if name in written:
                    member.size = len(written[name])
                    archive.addfile(member, io.BytesIO(written[name]))
                    continue
                with stored[name].open("rb") as file:
                    member.size = stored[name].stat().st_size
                    archive.addfile(member, file)
        scratch.chmod(0o644)  # mkstemp lets the owner alone read
        scratch.replace(out)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format_row(report: FormatReport) -> tuple[str, ...]:
    latency = report.latency
    name = FORMAT_NAMES[report.format]
    return (
        name if report.published else f"{name} (left out)",
        f"{report.size_bytes / 1e6:.1f}" if report.published else "",
        *(
            (
                _figure_within(latency.p50_ms, latency.p50_intervals),
                _figure_within(latency.p95_ms, latency.p95_intervals),
                _figure_within(latency.p99_ms, latency.p99_intervals),
            )
            if latency
            else ["not measured"] * 3
        ),
        _figure_within(report.speedup, latency.speedup_intervals if latency else ())
        if report.speedup is not None
        else "not measured",
        f"{report.parity_max_abs:.1e} over {report.parity_rows} rows"
        if report.parity_max_abs is not None
        else "unknown",
    )


def _latency_words(formats: Sequence[FormatReport], environment: Mapping[str, str]) -> str:
    latency = next((report.latency for report in formats if report.latency), None)
    if latency is None:
        return "Its latency was not measured."
    where = "; ".join(f"{name} {_plain(value)}" for name, value in sorted(environment.items()))
    return (
        f"Latency is that of {latency.rounds} calls on {latency.batch_size} row"
        f"{'' if latency.batch_size == 1 else 's'} of {latency.seq_len} tokens with "
        f"{latency.threads} thread{'' if latency.threads == 1 else 's'}, tokenizing left out, "
        f"measured on the CPU, by turns with the teacher, on this machine: {where}. Other "
        "machines give other ratios."
        + (
            f" In brackets: where a figure lies with {100 * SHOWN_CONFIDENCE:g} % confidence."
            if latency.p50_intervals
            else ""
        )
    )


def _prediction_words(formats: Sequence[FormatReport]) -> Iterator[str]:
    for report in formats:
        found = report.predicted
        if found is not None and report.published:
            setting = LatencySetting(found.batch_size, found.seq_len, found.threads)
            yield (
                f"For another device its latency was predicted, not measured: in "
                f"{FORMAT_NAMES[report.format]} a p50 of {found.p50_ms:.2f} ms and a speed-up of "
                f"{found.speedup:.2f} ({setting}), {_plain(in_words(found.on))}. The device's "
                f"profile is {_code(found.on.profile)}, SHA-256 {found.on.sha256}; its description "
                "is in `manifest.json`."
            )


def _baseline_words(teacher: TeacherReport, metric: str) -> str:
    """What one would do instead: the teacher as it was measured beside, int8 with its accuracy."""
    measured = [
        f"{report.latency.p50_ms:.2f} ms in {FORMAT_NAMES[report.format]}"
        + (f" ({metric} on dev {_figure(report.accuracy)})" if report.accuracy is not None else "")
        for report in teacher.formats
        if report.latency is not None
    ]
    return f"The teacher's p50, measured beside it: {'; '.join(measured)}." if measured else ""


def _how_to_run(facts: BundleFacts) -> str:
    published = {report.format for report in facts.subnetwork.formats if report.published}
    texts = '"a text" "its pair"' if facts.dataset.text_pair else '"a text"'
    if facts.spec.task.kind == "question_answering":
        texts = '"a question" "its context"'
    sentences = []
    chosen = facts.selected_format
    onnx_first = sorted(  # and the chosen one before it, as predict.py has it
        SERVED_FORMATS, key=lambda fmt: (fmt != chosen, fp32_format(fmt) != "onnx")
    )
    if served := [fmt for fmt in onnx_first if fmt in published]:
        runtime = {"onnx": "onnxruntime", "paddle": "paddlepaddle"}[fp32_format(served[0])]
        sentences.append(f"`python predict.py {texts}` needs numpy, tokenizers and {runtime}.")
    sentences.append("`python predict.py --check` compares every file with `manifest.json`.")
    if "safetensors" in published:
        sentences.append(
            "For further training, load `safetensors/` with the files of `tokenizer/`."
        )
    return " ".join(sentences)


def _missing_formats(formats: Sequence[FormatReport]) -> list[str]:
    return [
        f"{FORMAT_NAMES[report.format]} was left out: {_plain(report.error or 'no reason given')}"
        for report in formats
        if not report.published
    ]


# What each format that rounds left as it was, unless the worst parts were left in fp32 besides.
_ROUNDED_PARTS: dict[Format, str] = {
    **dict.fromkeys(INT8_FORMATS, "All its products and tables are in int8 but the classifier."),
    "onnx-fp16": "It is meant for GPUs; all that is told of it here was computed on the CPU, which "
    "has no kernels for most of it and computes that in fp32 between two roundings.",
    "paddle-bf16": "Its weights are stored in fp32, and oneDNN computes its products in bf16; on a "
    "processor without instructions for that they are computed in fp32.",
}


def _rounded_words(formats: Sequence[FormatReport], metric: str, *, numbers: bool) -> list[str]:
    """Of each published format that rounds: what it is worth itself, and what it left in fp32.

    `numbers`: that is what it answers with, so no answers can be flipped.
    """

    def rounding(report: FormatReport) -> str:
        own, most = report.flipped, report.max_flipped
        if numbers:
            return (
                f"{_figure(own)} of the {metric} is lost against fp32, of {_figure(most)} allowed"
            )
        return f"{_share(own)} of the answers differ from those in fp32, of {_share(most)} allowed"

    return [
        f"{FORMAT_NAMES[report.format]} rounds, so it is judged by its own answers: {metric} on "
        f"dev {_figure(report.accuracy)}, and {rounding(report)}. "
        + _own_drop(report, metric)
        + (
            f"Left in fp32: {', '.join(_code(part) for part in report.fp32_parts)}."
            if report.fp32_parts
            else _ROUNDED_PARTS[report.format]
        )
        for report in formats
        if report.published and report.flipped is not None
    ]


def _own_drop(report: FormatReport, metric: str) -> str:
    if report.accuracy_drop is None:
        return ""
    lost = _lost(report.accuracy_drop_intervals)
    return f"This {metric} is {_against(report.accuracy_drop)} the teacher's{lost}. "


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _drop(subnetwork: SubnetworkReport, metric: str) -> str:
    points = subnetwork.accuracy_drop
    lost = _lost(subnetwork.accuracy_drop_intervals)
    if points == 0:
        return f"On dev its {metric} is that of the teacher{lost}."
    return f"On dev its {metric} is {_against(points)} the teacher's{lost}."


def _against(points: float) -> str:
    """ "0.40 points below": of points lost."""
    return f"{abs(points):.2f} points {'below' if points >= 0 else 'above'}"


def _lost(intervals: Intervals) -> str:
    """ " (95 %: -0.10 to 0.90 points lost)"; nothing where no interval was kept."""
    interval = _within(intervals)
    return f" ({100 * SHOWN_CONFIDENCE:g} %: {interval} points lost)" if interval else ""


def _figure_within(value: float, intervals: Intervals) -> str:
    """ "3.72 (3.60 to 3.90)"."""
    interval = _within(intervals)
    return f"{value:.2f}" + (f" ({interval})" if interval else "")


def _within(intervals: Intervals) -> str:
    return "".join(
        f"{each.low:.2f} to {each.high:.2f}"
        for each in intervals
        if each.confidence == SHOWN_CONFIDENCE
    )


def _test_words(subnetwork: SubnetworkReport, metric: str) -> str:
    """What it lost on test, and whose answers these are where not the sub-network's in fp32."""
    test = subnetwork.test
    if test is None:
        return ""
    is_teacher = test.reference == TEACHER
    words = (
        f"Its {metric} on test is {_against(test.accuracy_drop)} that of "
        f"{'the teacher' if is_teacher else _code(test.reference)}"
        f"{_lost(test.accuracy_drop_intervals)}"
        f"{'' if is_teacher else ', which is better than the teacher on dev'}."
    )
    if test.format is None:
        return words
    name = FORMAT_NAMES[test.format]
    return f"{words} On test the {name} file, which was chosen, was judged by its own answers."


def _in_format(fmt: Format | None) -> str:
    return "" if fmt is None else f", in {FORMAT_NAMES[fmt]}"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _plain(text: str) -> str:
    """User text in one line that cannot end a table cell or begin markup."""
    line = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        line = line.replace(character, "\\" + character)
    return line


def _code(text: str) -> str:
    """User text as a code span; backticks and bars, which would end span or cell, become quotes."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\u00a6") + "`"


__all__ = [
    "BundleFacts",
    "build_manifest",
    "input_digests",
    "model_card",
    "write_bundle",
]
