"""`python -m worker` with the tests' stand-in for the job's process."""

from __future__ import annotations

import sys

from jobs.logs import configure_logging
from jobs.settings import get_settings
from tests.worker.helpers import CHILD_COMMAND
from worker.__main__ import serve

if __name__ == "__main__":
    configure_logging(get_settings())
    sys.exit(serve(get_settings(), child_command=CHILD_COMMAND))
