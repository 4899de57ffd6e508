"""`make chaos`: a seeded run of small real jobs and faults. The last line is one JSON object.

    make chaos ARGS="--seed 7 --jobs 100 --faults 1000 --minutes 75"

It needs a kernel that grants a mount namespace and a process namespace, as root or in a user
namespace: the disk that fills is a tmpfs there, and the kernel ends all that the run has started
when the run ends, in whatever way.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from tests.chaos.run import Options, run
from tests.chaos.site import STORE_MEBIBYTES
from tests.e2e.service import ROOT
from tests.services import ServiceMissing

_INSIDE = "--inside"


def count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 100_000:
        raise argparse.ArgumentTypeError("from 1 to 100000")
    return number


def minutes(text: str) -> float:
    given = float(text)
    if not 5 <= given <= 24 * 60:  # the last three are what begun jobs need for their ends
        raise argparse.ArgumentTypeError("from 5 to 1440")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 with violations, or 2 where it could not be run."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what is done to whom, and when")
    parser.add_argument("--jobs", type=count, default=100)
    parser.add_argument("--faults", type=count, default=1000)
    parser.add_argument("--minutes", type=minutes, default=75, help="then it comes to an end")
    parser.add_argument("--keep", type=Path, help="a new folder for the data and the logs")
    parser.add_argument(_INSIDE, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit)
    if given.inside is None:
        return _enter(given.keep, arguments if arguments is not None else sys.argv[1:])
    end_with_standard_input()
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"[{time.monotonic() - began:7.1f} s] {words}", flush=True)

    disk = given.inside / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={STORE_MEBIBYTES}m", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    for part in ("api", "compression", "jobs", "worker"):
        # Processes start by the hundred, and write no bytecode themselves.
        compileall.compile_dir(ROOT / part, quiet=2)
    options = Options(given.seed, given.jobs, given.faults, given.minutes)
    say(f"{options}")
    try:
        outcome = run(options, given.inside, say)
    except ServiceMissing as error:
        print(error, file=sys.stderr)
        return 2
    for violation in outcome.findings.violations:
        say(f"violation: {violation}")
    print(json.dumps(outcome.as_json()), flush=True)
    return 1 if outcome.findings.violations else 0


def _enter(keep: Path | None, arguments: list[str]) -> int:
    """Runs this program in namespaces of its own, in a folder that is gone afterwards."""
    if keep is not None and keep.exists():
        print(f"--keep: {keep} is there already; name a new folder", file=sys.stderr)
        return 2
    folder = keep.absolute() if keep else Path(tempfile.mkdtemp(prefix="widthwise-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid() != 0:  # with rights over its own mounts, and still not root
        namespaces += ["--user", "--map-current-user", "--keep-caps"]
    try:
        probe = subprocess.run([*namespaces, "true"], capture_output=True, text=True, check=False)
        if probe.returncode != 0:
            print(
                f"a full disk cannot be made here ({probe.stderr.strip()}): run it as root, or "
                "where the kernel allows user namespaces",
                file=sys.stderr,
            )
            return 2
        command = [sys.executable, "-m", "tests.chaos", *arguments, _INSIDE, str(folder)]
        # What the servers of the run put into temporary folders goes with the folder too.
        temporary = folder / "tmp"
        temporary.mkdir()
        environment = {**os.environ, "TMPDIR": str(temporary)}
        # It ends when this process does, even by SIGKILL: then its standard input is closed.
        inside = subprocess.Popen([*namespaces, *command], env=environment, stdin=subprocess.PIPE)
        try:
            return inside.wait()
        finally:
            inside.kill()  # and with it, all that it has started
            inside.wait()
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def end_with_standard_input() -> None:
    """Ends this process once nobody holds the other end of its standard input; and with it, if it
    is the first of a process namespace, all of that."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="caller", daemon=True).start()


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
