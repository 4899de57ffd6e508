"""What every stage reads: spec, model, tokenizer and dataset, checked against each other.

`load` makes a `Job` of them before anything is trained. Beside it stand what the report notes of
the rows and the vocabulary that were read, and what makes a checkpoint this job's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from compression import latency
from compression.batches import Encoded
from compression.bundle import input_digests
from compression.checkpoint import digest
from compression.device import own_replicas
from compression.device_profile import DeviceProfile, Predictor, job_predictor
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.errors import InvalidSpec
from compression.plan import AnyExamples, Plan, held_out_rows, make_plan, model_info, resolve_rows
from compression.regression import RowFacts, row_facts
from compression.report import VocabularyReport
from compression.spec import Spec
from compression.tables import Columns, profile, read_splits, shared_rows
from compression.tasks import Task, make_task
from compression.teachers import Checkpoint, read_checkpoint
from compression.teachers.config import EncoderConfig
from compression.tokenization import load_tokenizer, save_tokenizer
from compression.vocabulary import (
    Vocabulary,
    effect,
    save_smaller_tokenizer,
    smaller_vocabulary,
    texts_of,
    unknown_entries,
)


@dataclass(frozen=True)
class Job:
    """What every stage reads: the spec, its plan, and rows as token ids."""

    spec: Spec
    plan: Plan
    task: Task
    checkpoint: Checkpoint
    rows: Mapping[str, int]  # of the dataset; long contexts are several rows of `splits`
    splits: Mapping[str, Encoded]
    facts: Mapping[str, RowFacts]  # of dev and test
    shared_rows: Mapping[str, int]
    seq_len: int  # of the latency measurement, tokens
    holdout: Encoded | None  # rows of train that only score the search's candidates
    held_out: int  # how many these are in the dataset
    replicas: int  # threads that share a batch in training, and the batches elsewhere
    # The splits as the finished sub-networks read them: `splits`, where no vocabulary is removed.
    own: Mapping[str, Encoded]
    vocabulary: Vocabulary | None
    vocabulary_effect: VocabularyReport | None

    def own_config(self, config: EncoderConfig) -> EncoderConfig:
        """A config of the model's vocabulary with that of the sub-networks."""
        return config if self.vocabulary is None else self.vocabulary.config(config)

    @property
    def own_pad_id(self) -> int:
        return self.own_config(self.checkpoint.config).pad_token_id

    def with_own_vocabulary(self, supernet: Encoder) -> Encoder:
        """The trained supernet without the rows of removed tokens."""
        if self.vocabulary is None:
            return supernet
        weights = self.vocabulary.weights(numpy_weights(supernet))
        return build_encoder(self.own_config(supernet.config), weights)

    def save_own_tokenizer(self, model_dir: Path, out_dir: Path) -> list[Path]:
        if self.vocabulary is None:
            return save_tokenizer(model_dir, out_dir)
        return save_smaller_tokenizer(self.vocabulary, model_dir, out_dir)


def load(spec: Spec, model_dir: Path, dataset_dir: Path, replicas: int | None) -> Job:
    """Reads and cross-checks model, tokenizer and dataset, and tokenises every row.

    `replicas`: of the job's earlier run, None for as many as suit this host.
    """
    checkpoint = read_checkpoint(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tables = read_splits(dataset_dir)
    plan = make_plan(spec, model_info(checkpoint, tokenizer), profile(tables))
    task = make_task(spec.task, plan.label_names)
    examples = resolve_rows(spec, plan, tables, spec.seed)
    rows = {split: len(examples[split]) for split in examples}
    train, held_out = without_held_out(spec, examples["train"])
    examples["train"] = train
    if held_out is not None and "unlabelled" in examples:
        if rest := without_texts(examples["unlabelled"], held_out):
            examples["unlabelled"] = rest
        else:
            del examples["unlabelled"]
    splits = {
        split: task.encode(tokenizer, examples[split], spec.task.max_seq_len) for split in examples
    }
    holdout = task.encode(tokenizer, held_out, spec.task.max_seq_len) if held_out else None
    own, vocabulary, vocabulary_effect = splits, None, None
    if spec.vocabulary.remove_unused:
        own, vocabulary, vocabulary_effect = smaller_splits(
            spec, task, checkpoint.config, tokenizer, examples, splits, holdout
        )
    dev_lengths = [len(ids) for ids in own["dev"].input_ids]
    return Job(
        spec=spec,
        plan=plan,
        task=task,
        checkpoint=checkpoint,
        rows=rows,
        splits=splits,
        facts={
            split: row_facts(
                # Where dev was taken from train, its lines are those of train.
                tables.get(split, tables["train"]),
                examples[split].lines,
                slices=spec.report.slices,
                text_columns=[name for name in (plan.text, plan.text_pair) if name is not None],
                excerpt_chars=spec.report.excerpt_chars,
            )
            for split in ("dev", "test")
            if split in examples
        },
        shared_rows=shared_rows(tables, Columns(plan.text, plan.text_pair, plan.label)),
        seq_len=spec.latency.seq_len or latency.p95_length(dev_lengths),
        holdout=holdout,
        held_out=len(held_out or ()),
        replicas=replicas or own_replicas(spec),
        own=own,
        vocabulary=vocabulary,
        vocabulary_effect=vocabulary_effect,
    )


def identity(spec: Spec, model_dir: Path, dataset_dir: Path) -> dict[str, str]:
    """What makes a checkpoint this job's: digests of all that goes into it.

    Not the spec's defaults: a version with one more field goes on with an older one's jobs.
    """
    return {
        "spec": digest(spec.model_dump_json(exclude_defaults=True)),
        "model": digest(json.dumps(input_digests(model_dir))),
        "dataset": digest(json.dumps(input_digests(dataset_dir))),
    }


def predictor_of(job: Job, profile: DeviceProfile | None) -> Predictor | None:
    """What predicts the latency that the constraints mean; None where they mean a measured one.

    InvalidSpec where the profile is missing or does not reach: before anything is trained.
    """
    if job.spec.constraints.latency_on is None:
        return None
    if profile is None:
        raise InvalidSpec(
            "latency is to be predicted for another device, and its profile was not given",
            pointer="/constraints/latency_on",
        )
    predictor = job_predictor(job.spec, profile, job.checkpoint.config, seq_len=job.seq_len)
    predictor.check(job.plan.subnetworks)
    return predictor


def without_held_out(spec: Spec, train: AnyExamples) -> tuple[AnyExamples, AnyExamples | None]:
    """Train without the rows that score the search's candidates, and these; equal texts together.

    None where there is no search.
    """
    count = held_out_rows(spec, len(train))
    if count == 0:
        return train, None
    groups: dict[Any, list[int]] = {}
    for row, group in enumerate(train.groups):
        groups.setdefault(group, []).append(row)
    texts, picked = list(groups.values()), []
    for number in np.random.default_rng([spec.seed, 6]).permutation(len(texts)):
        if len(picked) + len(texts[number]) <= count:
            picked += texts[number]
    if not picked:
        raise InvalidSpec(
            f"no {count} rows of train can be held out to score candidates: more than that stand "
            "together, with equal texts or one context; leave per_layer out",
            pointer="/supernet/per_layer/holdout_rows",
        )
    chosen = set(picked)
    return train.take([i for i in range(len(train)) if i not in chosen]), train.take(sorted(picked))


def without_texts(rows: AnyExamples, others: AnyExamples) -> AnyExamples:
    """Those of `rows` whose text, or context, is none of the others'."""
    known = set(others.groups)
    return rows.take([i for i, group in enumerate(rows.groups) if group not in known])


def smaller_splits(
    spec: Spec,
    task: Task,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    examples: Mapping[str, AnyExamples],
    splits: Mapping[str, Encoded],
    holdout: Encoded | None,
) -> tuple[dict[str, Encoded], Vocabulary, VocabularyReport]:
    """The splits without the tokens that the spec has removed, what is left, and what that does.

    `holdout`: rows of train too, though nothing is trained on them.
    """
    read = [splits[split] for split in ("train", "unlabelled") if split in splits]
    read += [holdout] if holdout is not None else []
    used = (row for rows in read for row in rows.input_ids)
    vocabulary = smaller_vocabulary(tokenizer, config, used, spec.vocabulary.keep)
    own = {
        split: dataclasses.replace(rows, input_ids=vocabulary.renumbered(rows.input_ids))
        if split in ("train", "unlabelled")
        else task.encode(vocabulary.tokenizer, examples[split], spec.task.max_seq_len)
        for split, rows in splits.items()
    }
    split: Literal["dev", "test"] = "test" if "test" in splits else "dev"
    return own, vocabulary, effect(tokenizer, vocabulary, texts_of(examples[split]), split)


def row_notes(job: Job) -> tuple[str, ...]:
    """Which rows were cut, and which were not trained on."""
    cut = tuple(
        f"{rows.cut} of {job.rows[split]} rows of {split} have {job.task.too_long} "
        f"{job.spec.task.max_seq_len} tokens and were cut"
        for split, rows in job.splits.items()
        if rows.cut
    )
    if job.holdout is None:
        return cut
    taught = "and teach nothing, nor do unlabelled rows of the same text"
    if "unlabelled" not in job.rows:
        taught = "and teach nothing"
    return (*cut, f"{job.held_out} rows of train score the search's candidates {taught}")


def vocabulary_notes(job: Job) -> Iterator[str]:
    """What the removal of tokens does beside what its figures say."""
    if job.vocabulary is None:
        return
    for split in ("dev", "test"):
        if split in job.own and job.own[split].cut > job.splits[split].cut:
            yield (
                f"without the removed tokens {job.own[split].cut} rows of {split} are longer than "
                f"{job.spec.task.max_seq_len} tokens, for the teacher {job.splits[split].cut}"
            )
    if unknown := unknown_entries(job.vocabulary.tokenizer, job.spec.vocabulary.keep):
        yield (
            f"the model's vocabulary lacks all or a part of {len(unknown)} entries of "
            f"vocabulary.keep, {unknown[0][:40]!r} for one: they are read as an unknown token"
        )
