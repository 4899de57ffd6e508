"""BF16 for Paddle Inference: the program in fp32, whose products oneDNN computes in bf16.

The files are those of the format paddle, as large as they: oneDNN rounds the weights when they are
loaded. On a processor without instructions for it Paddle took the switch without a word and
computed in fp32, so nothing is written there: it would be judged and timed under a wrong name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.errors import ExportFailed
from compression.export.base import ExportSource
from compression.export.paddle import PaddleExporter
from compression.runtime_env import instruction_sets

NEEDED = ("avx512_bf16", "amx_bf16")  # one of them


class PaddleBf16Exporter(PaddleExporter):
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        if set(NEEDED).isdisjoint(instruction_sets()):
            raise ExportFailed(
                f"this processor has no bf16 instructions ({' or '.join(NEEDED)}), so it would be "
                "computed in fp32: run the job on a worker whose processor has them"
            )
        return super().write(source, folder)

    def adjust(self, config: Any) -> None:
        config.enable_mkldnn_bfloat16()

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "precision": "bfloat16"}
