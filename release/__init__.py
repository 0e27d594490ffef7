"""Builds and judges what is released; none of it is in the wheel. `make wheel`, `make sdist`, `make torch-matrix`."""
