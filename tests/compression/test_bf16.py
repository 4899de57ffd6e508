"""BF16 for Paddle Inference: written where the processor has bf16 alone, and judged as fp16 is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compression.batches import pad
from compression.encoder import build_encoder
from compression.evaluate import padded_logits, predict
from compression.export import Exported, export_formats, paddle_bf16, served_bytes, served_logits
from compression.runtime_env import instruction_sets
from compression.spec import HALF_GATE, Format, Int8Spec, fp32_format, gate_of
from tests.encoders import random_rows, random_weights, tiny_config

BF16: Format = "paddle-bf16"
ROWS = 40
HAS_BF16 = not set(paddle_bf16.NEEDED).isdisjoint(instruction_sets())


def exported(folder: Path) -> tuple[dict[Format, Exported], np.ndarray]:
    """The formats' files below `folder`, with rows.npz beside them; the encoder's own logits."""
    config = tiny_config()
    encoder = build_encoder(config, random_weights(config))
    rows = random_rows(ROWS)
    np.savez(folder / "rows.npz", **pad(rows, range(ROWS), pad_id=0))
    logits = padded_logits(np.asarray(predict(encoder, rows)))
    return export_formats(("paddle", BF16), encoder, folder / "w1", labels=None), logits


def test_where_the_processor_has_no_bf16_nothing_is_written_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paddle_bf16, "instruction_sets", lambda: ("avx2", "avx512f"))
    files, _ = exported(tmp_path)
    assert files["paddle"].error is None
    error = files[BF16].error
    assert error is not None and "no bf16 instructions (avx512_bf16 or amx_bf16)" in error
    assert not files[BF16].folder.exists()


def test_it_is_the_program_in_fp32_with_a_switch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paddle_bf16, "instruction_sets", lambda: ("amx_bf16",))
    files, expected = exported(tmp_path)
    plain, half = files["paddle"], files[BF16]
    assert half.error is None
    assert served_bytes(BF16, half.folder) == served_bytes("paddle", plain.folder)
    answers = {
        fmt: served_logits(
            fmt, own.folder, rows=tmp_path / "rows.npz", batch_size=16, out=tmp_path / "out.npz"
        )
        for fmt, own in files.items()
    }
    assert np.abs(answers["paddle"] - expected).max() < 1e-4
    rounding = np.abs(answers[BF16] - expected).max()
    assert rounding < 0.1 * expected.std()
    if HAS_BF16:  # else Paddle takes the switch without a word, and may compute in fp32
        assert rounding > 1e-4


def test_it_has_the_gate_of_fp16_and_the_teacher_of_its_runtime() -> None:
    assert gate_of(BF16, Int8Spec(max_flipped=0.2)) == HALF_GATE
    assert HALF_GATE.max_flipped == 0.005
    assert fp32_format(BF16) == "paddle"
