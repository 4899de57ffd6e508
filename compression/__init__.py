"""Widthwise's compression library: values and paths in, a report and files out.

No web, queue, database or environment in here. The modules that do not import
paddle are listed in pyproject.toml's import contracts; `api` and `jobs` may
import those alone.
"""

import sys

# PEP 784 gives the standard library a package of this name from Python 3.14 on.
if sys.version_info >= (3, 13):
    raise ImportError(
        "Widthwise runs on Python 3.11 and 3.12: its package 'compression' shares its name with "
        "a standard-library package of later versions, and numpy 1.26 has no wheels for them."
    )
