"""What every test may rely on: it starts from, and leaves behind, the default threads, dtype and SIMD level."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from lowrank_kernels import _native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is a GPU that the kernels run on."""
    if torch.cuda.is_available():
        reason = _native.gpu_reason(torch.cuda.current_device())
    else:
        reason = f"no GPU that torch can use: {_native.cuda_info()['reason'] or 'torch was built without CUDA'}"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    level = _native._C.simd_level() if _native.has_cpu() else None
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    if level is not None:
        _native._C.set_simd_level(level)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def capture() -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Records a function as a CUDA graph; returns the graph and the outputs that every replay fills."""

    def record(function: Callable[[], Any]) -> tuple[Any, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as torch asks for: libraries make their handles outside the capture
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return graph, outputs

    return record


@pytest.fixture
def spare_memory() -> Callable[[int], AbstractContextManager[None]]:
    """Leaves this process so many bytes of the GPU; what others use of it stays as it is."""

    @contextmanager
    def limit(spare: int) -> Iterator[None]:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    return limit


@pytest.fixture
def churn() -> Callable[[str, int], None]:
    """Leaves NaN in the blocks that torch's allocator hands out next: what is not written, or added to, shows."""

    def fill(device: str, seed: int) -> None:
        sizes = torch.randint(1, 1 << 18, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        blocks = [torch.full((size,), float("nan"), device=device) for size in sizes]
        del blocks[::2]
        blocks.append(torch.full((1 << 20,), float("nan"), device=device))

    return fill
