"""Benches: ``python -m bench``. Correctness is checked before anything is timed; rows are appended to ``bench/data``."""
