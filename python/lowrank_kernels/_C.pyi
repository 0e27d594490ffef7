# Types of the native module (csrc/bindings.cpp). Addresses are integers, 0 for none; arguments are by position only.
# tests/test_native_module.py compares this file with the module.

version: str
compiler: str
openmp: bool
has_cuda: bool
no_cuda: str
cuda_version: str
cuda_architectures: str
max_rank: int

def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def simd_bytes() -> int: ...
def set_simd_level(name: str, /) -> None: ...
def cuda_info() -> dict[str, int | str]: ...

class CompletionArguments:
    def __init__(
        self,
        own_count: int,
        other_count: int,
        entry_count: int,
        width: int,
        offsets: int,
        other_index: int,
        values: int,
        weights: int,
        own: int,
        other: int,
        own_bias: int,
        other_bias: int,
        offset: float,
        plan: int,
        plan_size: int,
        long_count: int,
        long_row: int,
        loss_parts: int,
        own_grad: int,
        own_bias_grad: int,
        own_loss: int,
        /,
    ) -> None: ...

def completion_cpu(is_double: bool, wide_index: bool, arguments: CompletionArguments, loss: int, threads: int, /) -> None: ...

class ThreeFactorArguments:
    def __init__(
        self,
        tokens: int,
        in_features: int,
        out_features: int,
        rank: int,
        depth: int,
        type: int,
        factor_type: int,
        x: int,
        x_stride: int,
        left: int,
        core: int,
        right: int,
        scale: float,
        shift: float,
        drop_threshold: int,
        seed: int,
        /,
    ) -> None: ...

def three_factor_forward_cpu(arguments: ThreeFactorArguments, bias: int, y: int, z: int, threads: int, /) -> None: ...
def three_factor_backward_cpu(
    arguments: ThreeFactorArguments,
    dy: int,
    dy_stride: int,
    z: int,
    dx: int,
    dleft: int,
    dcore: int,
    dright: int,
    threads: int,
    /,
) -> None: ...

# Only where has_cuda.

def completion_cuda_workspace(is_double: bool, wide_index: bool, arguments: CompletionArguments, want_loss: bool, /) -> int: ...
def completion_cuda(
    is_double: bool,
    wide_index: bool,
    arguments: CompletionArguments,
    workspace: int,
    loss: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def three_factor_cuda_workspace(arguments: ThreeFactorArguments, backward: bool, /) -> int: ...
def three_factor_forward_cuda(
    arguments: ThreeFactorArguments, bias: int, y: int, z: int, workspace: int, device: int, stream: int, /
) -> None: ...
def three_factor_backward_cuda(
    arguments: ThreeFactorArguments,
    dy: int,
    dy_stride: int,
    z: int,
    dx: int,
    dleft: int,
    dcore: int,
    dright: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
