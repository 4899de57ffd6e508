"""What a model family has to say: how its config reads and what its weights are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compression.teachers.config import EncoderConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One toolkit's names for the parameters of a family.

    `names` maps its names to ours; `{i}` in both stands for the layer's number, and
    both are stems: ".weight" and ".bias" follow. `linear_out_in` is True where its
    linear weights are [out, in] and have to be transposed. `fixed` are fields of our
    config that this toolkit has in its code, whatever a model's config says.
    """

    name: str
    names: Mapping[str, str]
    linear_out_in: bool
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Our name for a parameter (prefix already removed); None where it has none."""
        stem, dot, kind = name.rpartition(".")
        if not dot or kind not in ("weight", "bias"):
            return None
        match = _NUMBER.search(stem)
        if match is None:
            ours = self.names.get(stem)
        else:
            ours = self.names.get(f"{stem[: match.start(1)]}{{i}}{stem[match.end(1) :]}")
            ours = ours and ours.replace("{i}", match[1])
        return ours and f"{ours}.{kind}"

    def transposed(self, ours: str, shape: Shape) -> bool:
        """Whether this parameter has to be transposed to become ours."""
        return self.linear_out_in and len(shape) == 2 and ours not in _TABLES


_TABLES = frozenset(
    f"embeddings.{table}.weight" for table in ("word", "position", "token_type", "task_type")
)
_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")


@dataclass(frozen=True)
class Family:
    """A family of encoders. A new one: a file that makes one of these, a line in registry.py.

    `parse` turns the raw config into ours, without labels; `type_vocab_size` of the
    weights stands in for a config that does not say it.
    `normalised` removes the family's prefix and mends old spellings of a parameter's name.
    `ignored` tells known parameters that no encoder needs (language-model heads, buffers).
    """

    name: str
    class_prefixes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    parse: Callable[[Mapping[str, Any], str, int | None], EncoderConfig]
    normalised: Callable[[str], str]
    ignored: Callable[[str], bool]
