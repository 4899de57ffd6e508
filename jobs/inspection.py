"""What an upload holds, found out without paddle and without trusting a byte of it.

`inspect_model_upload` and `inspect_dataset_upload` start a sandboxed child that
unpacks, parses and checks, and leaves a folder of clean files: safetensors, JSON and
rows. Nothing else of an upload is ever read again. By hand:

    python -m jobs.inspection model|dataset SRC OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compression.examples import with_defects
from compression.plan import ModelInfo, model_info
from compression.tables import DatasetProfile, profile, read_splits, write_clean
from compression.teachers import (
    CONFIG_FILES,
    PICKLE_FILES,
    WEIGHTS_FILE,
    check_checkpoint,
)
from compression.teachers.fields import read_json_object
from compression.tokenization import TOKENIZER_FILES
from jobs import archives, pickles
from jobs.errors import UploadRejected, as_json
from jobs.sandbox import Limits, bound_memory, run_sandboxed
from jobs.tokenizer_trial import try_tokenizer

if TYPE_CHECKING:  # the sandbox's child, which imports this module, starts faster without it
    from jobs.settings import Settings

_MAX_PARAMETERS_NAMED = 10
# Address space that an inspection may take: an interpreter with its libraries, and for each byte
# of what the upload holds. A row of a table with short cells takes a hundred times its text.
_MEMORY_BASE = 2**30
_MEMORY_A_BYTE = 100


@dataclass(frozen=True)
class ModelInspection:
    """`files`: names of the clean files, all directly in the output folder."""

    info: ModelInfo
    files: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DatasetInspection:
    """`files` as in ModelInspection; `warnings` are the profile's."""

    profile: DatasetProfile
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def inspect_model_upload(
    files: Sequence[Path], out_dir: Path, settings: Settings
) -> ModelInspection:
    """Checks an uploaded model: one archive, or the files of a model folder.

    Takes seconds; call it in a thread. `out_dir` is made, and gone again where the
    upload is refused. UploadRejected says why, with a stable code.
    """
    answer = _inspect("model", files, out_dir, settings)
    try:
        info = ModelInfo.model_validate(answer["info"])
        return ModelInspection(info, _names(answer, out_dir), _strings(answer.get("warnings")))
    except (KeyError, ValidationError) as error:
        raise _unusable(out_dir) from error


def inspect_dataset_upload(
    files: Sequence[Path], out_dir: Path, settings: Settings
) -> DatasetInspection:
    """Checks an uploaded dataset: one archive, or files named train, dev, test or unlabelled.

    As `inspect_model_upload`; broken rows are in the error's `rows`, with their lines.
    """
    answer = _inspect("dataset", files, out_dir, settings)
    try:
        found = DatasetProfile.model_validate(answer["profile"])
        return DatasetInspection(found, _names(answer, out_dir), found.warnings)
    except (KeyError, ValidationError) as error:
        raise _unusable(out_dir) from error


def _inspect(kind: str, files: Sequence[Path], out_dir: Path, settings: Settings) -> dict[str, Any]:
    out_dir = out_dir.absolute()
    out_dir.mkdir(parents=True)
    limits = Limits(
        seconds=settings.sandbox_seconds,
        memory_bytes=settings.sandbox_memory_bytes,
        output_bytes=settings.sandbox_output_bytes,
        max_files=settings.sandbox_max_files,
        tokenizer_seconds=settings.sandbox_tokenizer_seconds,
    )
    request = {
        "kind": kind,
        "files": [str(path.absolute()) for path in files],
        "out_dir": str(out_dir),
        "limits": asdict(limits),
    }
    try:
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix="inspect-") as work_dir:
            return run_sandboxed(
                "jobs.inspection",
                request,
                Path(work_dir),
                limits,
                readable=[path.absolute() for path in files],
                writable=[out_dir],
            )
    except BaseException:
        shutil.rmtree(out_dir, ignore_errors=True)
        raise


def _names(answer: dict[str, Any], out_dir: Path) -> tuple[str, ...]:
    """The files that really lie in the output folder; plain ones, each directly in it."""
    found = sorted(path.name for path in out_dir.iterdir())
    if any((out_dir / name).is_symlink() or not (out_dir / name).is_file() for name in found):
        raise _unusable(out_dir)
    if found != sorted(_strings(answer.get("files"))):
        raise _unusable(out_dir)
    return tuple(found)


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(str(item)[:2000] for item in value) if isinstance(value, list) else ()


def _unusable(out_dir: Path) -> UploadRejected:
    shutil.rmtree(out_dir, ignore_errors=True)
    return UploadRejected("The upload could not be inspected.", code="inspection-failed")


# --- in the sandbox -------------------------------------------------------------------------


def sandboxed(request: dict[str, Any]) -> dict[str, Any]:
    """What the confined child does. Its current folder is its own, and empty."""
    limits = Limits(**request["limits"])
    files = [Path(path) for path in request["files"]]
    out_dir = Path(request["out_dir"])
    folder = _gathered(files, Path.cwd() / "upload", limits)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bound_memory(_MEMORY_BASE + _MEMORY_A_BYTE * size)
    inspect = {"model": _inspect_model, "dataset": _inspect_dataset}[request["kind"]]
    answer = inspect(folder, out_dir, limits)
    return {**answer, "files": sorted(path.name for path in out_dir.iterdir())}


def _gathered(files: Sequence[Path], folder: Path, limits: Limits) -> Path:
    """A folder with the upload's files, unpacked where they came as an archive."""
    if not files:
        raise UploadRejected("The upload has no files.", code="empty-upload")
    folder.mkdir()
    packed = [path for path in files if archives.is_archive(path.name)]
    if packed and len(files) > 1:
        raise UploadRejected(
            f"Upload {packed[0].name} alone, or its files without an archive.",
            code="mixed-upload",
            pointer=packed[0].name,
        )
    if packed:
        return archives.unpack(
            packed[0], folder, max_files=limits.max_files, max_bytes=limits.output_bytes
        )
    for path in files:
        try:
            (folder / path.name).symlink_to(path)
        except FileExistsError as error:
            raise UploadRejected(
                f"The upload has {path.name} twice.", code="mixed-upload", pointer=path.name
            ) from error
    return folder


def _inspect_model(folder: Path, out_dir: Path, limits: Limits) -> dict[str, Any]:
    warnings: list[str] = []
    config = next((name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if config is not None:
        read_json_object(folder / config)
        _keep(folder / config, out_dir)
    pickled = [name for name in PICKLE_FILES if (folder / name).is_file()]
    if (folder / WEIGHTS_FILE).is_file():
        _keep(folder / WEIGHTS_FILE, out_dir)
        if pickled:
            warnings.append(f"{WEIGHTS_FILE} is used; {', '.join(pickled)} was not looked at.")
    elif len(pickled) > 1:
        raise UploadRejected(
            f"The upload has the weights twice: {' and '.join(pickled)}.",
            code="invalid-model",
            pointer=pickled[1],
        )
    elif pickled and config is not None:
        pickles.convert(folder / pickled[0], out_dir / WEIGHTS_FILE)
        warnings.append(f"{pickled[0]} was converted to {WEIGHTS_FILE}.")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            if name.endswith(".json"):
                read_json_object(folder / name)
            _keep(folder / name, out_dir)
    checkpoint = check_checkpoint(out_dir)
    tokenizer = try_tokenizer(out_dir, checkpoint.config, seconds=limits.tokenizer_seconds)
    if checkpoint.ignored:
        warnings.append(
            "Left out, because no encoder needs them: "
            + ", ".join(checkpoint.ignored[:_MAX_PARAMETERS_NAMED])
            + (" and others." if len(checkpoint.ignored) > _MAX_PARAMETERS_NAMED else ".")
        )
    info = model_info(checkpoint, tokenizer)
    return {"info": info.model_dump(mode="json"), "warnings": warnings}


def _keep(file: Path, out_dir: Path) -> None:
    """Moves what was unpacked here, which may be large; copies what lies elsewhere."""
    if not file.is_symlink():
        try:
            file.rename(out_dir / file.name)
            return
        except OSError:  # a kernel whose Landlock forbids it
            pass
    shutil.copyfile(file, out_dir / file.name)


def _inspect_dataset(folder: Path, out_dir: Path, limits: Limits) -> dict[str, Any]:
    splits = read_splits(folder)
    found = with_defects(profile(splits), splits)
    write_clean(splits, out_dir)
    return {"profile": found.model_dump(mode="json")}


# --- by hand --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m jobs.inspection model|dataset SRC OUT`; SRC is an archive, a file or a folder."""
    from jobs.settings import get_settings

    parser = argparse.ArgumentParser(prog="python -m jobs.inspection", description=__doc__)
    parser.add_argument("kind", choices=("model", "dataset"))
    parser.add_argument("src", type=Path)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    given = parser.parse_args(arguments)
    if given.src.is_dir():
        files = sorted(path for path in given.src.iterdir() if path.is_file())
    elif given.src.is_file():
        files = [given.src]
    else:
        parser.error(f"{given.src} is neither a file nor a folder")
    if given.out.exists():
        parser.error(f"{given.out} exists already")
    try:
        answer: dict[str, Any]
        if given.kind == "model":
            model = inspect_model_upload(files, given.out, get_settings())
            answer = {**asdict(model), "info": model.info.model_dump(mode="json")}
        else:
            dataset = inspect_dataset_upload(files, given.out, get_settings())
            answer = {**asdict(dataset), "profile": dataset.profile.model_dump(mode="json")}
    except UploadRejected as error:
        print(json.dumps(as_json(error), indent=2), file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
