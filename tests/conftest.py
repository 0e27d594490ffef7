"""What every test may rely on: it starts from, and leaves behind, the default threads, dtype and SIMD level."""

from collections.abc import Iterator

import pytest
import torch

from lowrank_kernels import _native


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    level = _native._C.simd_level() if _native.has_cpu() else None
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    if level is not None:
        _native._C.set_simd_level(level)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
