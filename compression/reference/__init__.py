"""PaddleSlim's own DynaBERT recipe as an engine, each run in a process of its own.

`run.py` is what the rest of the library imports: it starts `python -m compression.reference`
and reads its answers. `mends.py` and `recipe.py` belong to that process alone: importing
PaddleSlim's helpers replaces paddle's attention for the whole process.
"""
