"""Compression of whole models: every Deep LoRA layer starts in the subspace of its weight's gradient at ``X = 0``.

For an adapted linear layer that gradient is ``D = sum over tokens dy^T x``, (out, in). It is never formed: hooks see x and dy
of each layer during one backward pass, a randomized range finder runs on the products ``D v = dy^T (x v)`` and
``D^T u = x^T (dy u)`` at once, and only ``D ~ u diag(s) v^T`` stays, (out + in) (k + oversampling) numbers a layer. Then, per
layer, ``left, right`` are the top k singular vectors (mode "aligned"), or the matched frames of the top k / 2 ones (mode
"paper", :mod:`lowrank_kernels.compression`).

x is kept through autograd's own saved tensors, so that gradient checkpointing holds: it is recomputed with its block.

Several processes run the range finder together: the products are summed over them, 12 thin matrices a layer and batch with
the defaults. So the directions are those of the summed gradient, which sketches that each process made and cut for itself
would miss where the processes' batches differ. A process that has no batch left, or does not reach a layer, adds zero.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, sections 2 to 4; range finder: Halko, Martinsson, Tropp, 2011.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import LossFn, LossOrBatches, batch_losses, checked_loss
from .compression import LinearOperator, aligned_frames, matched_frames, top_singular_vectors
from .nn import AdapterInfo, AdapterLayer
from .processes import Team, agreed, assign, is_sharded, sharding_team, team_of, unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CAST_ELEMENTS = 2**20  # of x and dy cast up at a time: 4 MiB in float32


class Approximation(NamedTuple):
    """``D ~ u diag(s) v^T`` with orthonormal u and v."""

    u: Tensor  # (m, r)
    s: Tensor  # (r,)
    v: Tensor  # (n, r)


@dataclass(frozen=True)
class LayerCompression:
    """What :func:`compress_` found in one layer: the singular values are the gradient's, the largest first."""

    name: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    singular_values: tuple[float, ...]  # (directions + oversampling,), or as many as the matrix has
    directions: int  # singular directions of the gradient that are used: k, in the paper's mode k / 2


@dataclass(frozen=True)
class CompressionReport:
    """The layers that :func:`compress_` initialized, and the losses of its batches; prints as a short table."""

    adapter: str
    losses: tuple[float, ...]  # of every backward pass; of several processes batch by batch, in the order of their ranks
    layers: tuple[LayerCompression, ...]
    processes: int = 1

    def __str__(self) -> str:
        by = f" of {self.processes} processes" if self.processes > 1 else ""
        lines = [f"adapter {self.adapter!r}: {len(self.layers)} layers from {len(self.losses)} backward passes{by}"]
        width = max(len(row.name) for row in self.layers)
        for row in self.layers:
            s, shape = row.singular_values, "x".join(map(str, row.shape))
            lines.append(
                f"{row.name:<{width}}  {shape:>11}  rank {row.rank:>3}  s from {s[0]:.3g} to {s[row.directions - 1]:.3g}"
            )
        return "\n".join(lines)


def compress_(
    model: nn.Module,
    loss_or_batches: LossOrBatches,
    *,
    loss_fn: LossFn | None = None,
    adapter: str | None = None,
    init_scale: float | None = None,
    oversampling: int = 8,
    iterations: int = 2,
    seed: int = 0,
    group: ProcessGroup | bool | None = None,
) -> CompressionReport:
    r"""Initialize every Deep LoRA layer of an adapted model from one gradient ``D`` of its weight, all adapters switched off.

    .. math:: aligned: \quad left = -U_k,\ right = V_k^T, \qquad \Delta W(0) = 0, \qquad D \approx U S V^T

    .. math:: paper: \quad span(right) = span[V_{k/2}, P^T U_{k/2}],\ span(left) = P\, span(right), \qquad
        \Delta W(0) = s\, \epsilon^L\, left \cdot right

    The mode is that of the adapter. Aligned, the gradient of every core is diagonal and negative at the start, so the cores
    grow along the gradient's own directions, the strongest first. The paper's is the compression of its section 3, with P a
    Haar map that is never formed.

    Args:
        model: a model with Deep LoRA layers, already in its final dtype and on its device.
        loss_or_batches: a function without arguments that runs the model and returns the scalar loss; or an iterable of
            batches, whose gradients are added up (take a few: ``itertools.islice(loader, 4)``).
        loss_fn: ``loss_fn(model, batch) -> scalar`` for batches; the default is ``model(**batch).loss`` for dict batches.
        adapter: which Deep LoRA adapter, where there are several.
        init_scale: epsilon of every core, in the paper's mode; default: as the layers were adapted with.
        oversampling: additional directions that the running approximation keeps.
        iterations: power iterations of the range finder.
        seed: with each layer's name it seeds that layer's draws, so the order of the layers does not matter.
        group: the processes that call this together, each with its own batches, whose gradients are added up; by default all,
            where ``torch.distributed`` is initialized. False: this process alone.

    Returns:
        ``CompressionReport(adapter, losses, layers, processes)``.

    Raises:
        ValueError: no Deep LoRA layer, an odd rank or ``init_scale`` in the wrong mode, a loss that is no finite scalar or does
            not depend on the layers, layers that the loss does not reach, a NaN or infinite gradient (the layer is named), no
            batches, merged adapters, an unknown adapter, a model on the meta device; processes whose layers or arguments
            differ, a sharded model whose processes have unequal numbers of batches. Nothing has been changed then, in any
            process: all of them raise.
        TypeError: batches of the wrong kind.

    Note:
        The pass runs in eval mode (dropout off; transformers then switches its own checkpointing off too) with every
        parameter frozen; training flags, ``requires_grad``, ``.grad`` and torch's random state are as before afterwards.
        Products are float32 (float64 for float64), their algebra float64. Deterministic. In float16, scale a loss
        whose gradients underflow: its scale does not change the result.

        Several processes end with the same bits, those of the first one, and with what one process finds on their batches
        joined step by step, up to the order of summation (a joined mean is the sum of equal shares, and scale is nothing).
        Numbers of batches may differ. Call it before or after ``DistributedDataParallel`` (names are then those inside) and
        after ``fully_shard``. A process that dies, and an error between the collectives of a sharded forward pass, ends in
        the group's timeout.

    Example:
        >>> import torch
        >>> from lowrank_kernels.initialization import compress_
        >>> from lowrank_kernels.nn import DeepLoRALinear
        >>> up, down = (DeepLoRALinear.from_linear(torch.nn.Linear(*shape), rank=4) for shape in ((6, 5), (5, 4)))
        >>> model = torch.nn.Sequential(up, torch.nn.Tanh(), down)
        >>> x, target = torch.ones(8, 6), torch.zeros(8, 4)
        >>> report = compress_(model, lambda: torch.nn.functional.mse_loss(model(x), target))
        >>> [(row.name, row.shape, row.rank) for row in report.layers]
        [('0', (5, 6), 4), ('2', (4, 5), 4)]

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, sections 3 and 4.
    """
    team = team_of("compress_", group)
    model = unwrapped(model)
    sharded = sharding_team(model).size > 1
    with team.together():
        layers, adapter = _targets(model, adapter)
        if oversampling < 0 or iterations < 0:
            raise ValueError(
                f"compress_: oversampling and iterations must not be negative, got {oversampling} and {iterations}"
            )
        if init_scale is not None and not math.isfinite(init_scale):
            raise ValueError(f"compress_: init_scale must be finite, got {init_scale}")
        if init_scale is not None and any(layer.adapters[adapter].mode != "paper" for layer in layers.values()):
            raise ValueError(
                f"compress_: init_scale belongs to mode='paper', got {init_scale}; an aligned adapter keeps the one it was "
                "adapted with, which its update is counted from"
            )
        ranks = {name: (layer.matrix_shape, layer.adapters[adapter].rank) for name, layer in layers.items()}
        same = {"adapter": adapter, "init_scale": init_scale, "oversampling": oversampling, "iterations": iterations}
        agreed(team, "compress_", {**same, "seed": seed, "layers": ranks})
        turns = _Turns(team)
        for name, layer in layers.items():
            width = _directions(layer.adapters[adapter]) + oversampling
            turns.sketches[name] = _Sketch(name, layer, width, iterations, seed, turns)
    with _quiet(model, turns.sketches.values()):
        losses = _passes(batch_losses("compress_", model, loss_or_batches, loss_fn), turns, sharded)
    if not losses:
        raise ValueError("compress_: loss_or_batches gave no batches, at least one is needed; an exhausted iterator?")
    missed = [name for name, sketch in turns.sketches.items() if sketch.found is None]
    if missed:
        raise ValueError(
            f"compress_: the loss does not reach {_some(missed)}; give a loss that depends on every adapted layer, "
            "or leave these layers out with adapt(exclude_modules=...)"
        )
    sharding_team(model)
    written, rows = [], []
    for name, layer in layers.items():
        info, found = layer.adapters[adapter], turns.sketches.pop(name).found
        assert found is not None
        info = info if init_scale is None else replace(info, init_scale=float(init_scale))
        count = _directions(info)
        u, v = found.u[:, :count].double(), found.v[:, :count].double()
        draws = _generator(seed, name, "frames")
        if info.mode == "paper":
            left, right = matched_frames(u, v, generator=draws)
        else:
            tol = 1e-10 if found.u.dtype == torch.float64 else 1e-5  # below, float64 and float32 products are rounding
            left, right = aligned_frames(u, found.s[:count], v, tol=tol, generator=draws)
        dtype, s = layer.left[adapter].dtype, team.first(found.s)
        written.append((layer, info, team.first(left.to(dtype)), team.first(right.to(dtype))))
        rows.append(LayerCompression(name, layer.matrix_shape, info.rank, tuple(s.tolist()), count))
    for layer, info, left, right in written:
        assert info.init_scale is not None
        core = info.init_scale * torch.eye(info.rank, dtype=torch.float64, device=left.device)
        values = {"left": left, "core": core.repeat(info.depth, 1, 1), "right": right}
        for kind, parameter in layer.adapter_parameters(adapter).items():
            assign(parameter, values[kind])
        layer.adapters[adapter] = info
    unmoved = [row.name for row in rows if row.singular_values[0] == 0]
    if unmoved:
        warnings.warn(
            f"compress_: the weight gradient is zero in {_some(unmoved)}: their directions are arbitrary; "
            "a head that starts at zero, or a loss that is already minimal?",
            stacklevel=2,
        )
    return CompressionReport(adapter, tuple(losses), tuple(rows), team.size)


def merge_approximations(parts: Sequence[Approximation], rank: int) -> Approximation:
    """The best approximation of ``sum_i u_i diag(s_i) v_i^T`` of at most this rank, in float64 and without forming the sum.

    Deterministic in the order of the parts: of batches, or of processes that saw different batches.
    """
    left = torch.cat([part.u.double() * part.s.double() for part in parts], 1)
    right = torch.cat([part.v.double() for part in parts], 1)
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    u, v = q_left @ u[:, :rank], q_right @ vh[:rank].t()
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u.dtype)  # canonical
    return Approximation(u * signs, s[:rank], v * signs)


# ---------------------------------------------------------------------- checks


def _targets(model: nn.Module, adapter: str | None) -> tuple[dict[str, AdapterLayer], str]:
    """The Deep LoRA layers that have the adapter, by name, and the adapter's name."""
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}
    layers = {name: layer for name, layer in adapted.items() if layer.method == "deeplora"}
    names = list(dict.fromkeys(key for layer in layers.values() for key in layer.adapters))
    if not names:
        raise ValueError("compress_: the model has no Deep LoRA layer; call lowrank_kernels.adapt(model, rank=...) first")
    if adapter is None:
        active = list(dict.fromkeys(key for layer in layers.values() for key in layer.active_adapters)) or names
        if len(active) > 1:
            raise ValueError(f"compress_: adapter must be given, one of {active}; got None")
        adapter = active[0]
    if adapter not in names:
        raise ValueError(f"compress_: adapter must be one of {names}, got {adapter!r}")
    layers = {name: layer for name, layer in layers.items() if adapter in layer.adapters}
    for name, layer in layers.items():
        rank, shape = layer.adapters[adapter].rank, layer.matrix_shape
        if rank % 2 and layer.adapters[adapter].mode == "paper":
            even = rank + 1 if rank < min(shape) else rank - 1
            raise ValueError(
                f"compress_: rank must be even (half of it are directions of the gradient), got {rank} in layer {name!r}; "
                f"adapt with rank {even}, or give that layer another in rank_pattern"
            )
    merged = [name for name, layer in adapted.items() if layer.merged]
    if merged:
        raise ValueError(f"compress_: adapters are merged in {_some(merged)}; call unmerge() on these layers first")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("compress_: the model is on the meta device and has no values; load its weights first")
    return layers, adapter


def _directions(info: AdapterInfo) -> int:
    """Singular directions of the gradient that a layer of this rank uses."""
    return info.rank // 2 if info.mode == "paper" else info.rank


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


# ---------------------------------------------------------------------- the pass


@contextmanager
def _quiet(model: nn.Module, sketches: Iterable[_Sketch]) -> Iterator[None]:
    """Hooks on, and for the pass: eval mode, adapters off, parameters frozen, random state set aside. Undone on every exit."""
    training = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({tensor.device for tensor in model.parameters() if tensor.device.type != "cpu"}, key=str)
    with ExitStack() as stack:
        for module, flag in training:
            stack.callback(setattr, module, "training", flag)
            module.training = False
            if isinstance(module, AdapterLayer):
                stack.enter_context(module.disabled())
        for parameter, flag in wanted:
            if is_sharded(parameter):  # fully_shard settles in its first pass what it does with those that require gradients
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
                continue
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for sketch in sketches:
            stack.callback(sketch.layer.register_forward_hook(sketch.see, with_kwargs=True).remove)
        stack.enter_context(torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Compiled code would pass the hooks by; set_stance came with torch 2.6.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _passes(closures: Iterator[Callable[[], Tensor]], turns: _Turns, sharded: bool) -> list[float]:
    """Forward and backward for every batch of every process; the losses of all."""
    losses: list[float] = []
    while True:
        with turns.team.together():
            closure = next(closures, None)
            having = turns.team.meet(closure is not None)
            if not any(having):
                return losses
            if sharded and not all(having):
                raise ValueError(
                    "compress_: with a sharded model every process needs as many batches, process "
                    f"{having.index(False)} has only {len(losses) // len(having)}; give all of them the same number"
                )
            loss = None if closure is None else checked_loss("compress_", closure)
            losses += [value for value in turns.team.meet(None if loss is None else float(loss.detach())) if value is not None]
            if loss is not None:
                loss.backward()
            turns.wait(None)


Product = Callable[[Tensor], Tensor]  # v -> D v or D^T v


class _Turns:
    """Which layer the processes work on together: their backward passes need not take the same way."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.sketches: dict[str, _Sketch] = {}

    def wait(self, mine: tuple[str, torch.dtype] | None) -> None:
        """Until it is the turn of a layer that this process came to; None: until all backward passes have ended.

        The lowest rank that waits for a layer decides; the others work on theirs later, and add zero to this one.
        """
        while True:
            wanted = [other for other in self.team.meet(mine) if other is not None]
            if not wanted or wanted[0] == mine:
                return
            name, storage = wanted[0]
            self.sketches[name].update(None, storage)


class _Sketch:
    """The running approximation of one layer's weight gradient."""

    def __init__(self, name: str, layer: AdapterLayer, width: int, iterations: int, seed: int, turns: _Turns) -> None:
        self.name, self.layer, self.iterations, self.seed, self.turns = name, layer, iterations, seed, turns
        self.width = min(width, *layer.matrix_shape)
        self.found: Approximation | None = None
        self.calls = 0

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Forward hook: the output's gradient will reach :meth:`add` together with the input."""
        if not torch.is_grad_enabled():  # reentrant checkpointing runs this forward again, with gradients
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        source = torch.zeros((), device=output.device, requires_grad=True)  # nothing before may require gradients
        return _Capture.apply(output, source, x, self)

    def add(self, x: Tensor, dy: Tensor) -> None:
        storage = torch.float64 if dy.dtype == torch.float64 else torch.float32
        self.turns.wait((self.name, storage))
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            gradient = _weight_gradient(self.layer, x, dy)
        self.update(gradient, storage)

    def update(self, gradient: LinearOperator | None, storage: torch.dtype) -> None:
        """Add the gradient summed over the processes; None where this one has nothing of it."""
        generator, self.calls = _generator(self.seed, self.name, str(self.calls)), self.calls + 1
        options: dict[str, Any] = {"oversampling": 0, "iterations": self.iterations, "generator": generator}
        device = self.layer.weight.device if gradient is None else gradient.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            total = self._total(gradient, device)
            found = Approximation(*top_singular_vectors(total, self.width, **options))
            if self.found is not None:
                found = merge_approximations([self.found, found], self.width)
        self.found = Approximation(found.u.to(storage), found.s, found.v.to(storage))

    def _total(self, gradient: LinearOperator | None, device: torch.device) -> LinearOperator:
        """Products with the sum over the processes; what is multiplied is the first one's, as their LAPACKs may differ."""
        m, n = self.layer.matrix_shape
        team = self.turns.team

        def product(own: Product | None, rows: int, v: Tensor) -> Tensor:
            v, failed = team.first(v), None
            total = v.new_zeros(rows, v.shape[1])
            if own is not None:
                try:
                    total = own(v)
                except Exception as error:  # the others are waiting for this product
                    if team.size == 1:
                        raise
                    failed = error
                    total = total.fill_(math.nan)
            team.sum(total)
            if failed is not None:
                raise failed
            if not bool(torch.isfinite(total).all()):
                raise ValueError(
                    f"compress_: the weight gradient is NaN or infinite in layer {self.name!r}; check the data and the loss, "
                    "or use float32 or bfloat16"
                )
            return total

        matmul, rmatmul = (None, None) if gradient is None else (gradient.matmul, gradient.rmatmul)
        return LinearOperator((m, n), lambda v: product(matmul, m, v), lambda u: product(rmatmul, n, u), device)


class _Capture(torch.autograd.Function):
    """The identity on a layer's output; its backward hands x and dy to a sketch."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor, x: Tensor, sketch: _Sketch) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sketch = sketch
        return output.data  # no view for autograd: what follows may work in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sketch.add(ctx.saved_tensors[0], dy)
        return dy if ctx.needs_input_grad[0] else None, None, None, None


def _generator(seed: int, name: str, part: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# ---------------------------------------------------------------------- products with a weight's gradient

PatchProduct = Callable[[Tensor, Tensor], Tensor]  # (x, v) -> x v (tokens, s); (x, z) -> x^T z (in, s)
_row_sums = torch.ops.aten.embedding_dense_backward


def _weight_gradient(layer: AdapterLayer, x: Tensor, dy: Tensor) -> LinearOperator:
    """``D = sum over tokens dy^T x`` of the layer's (out, in) matrix, as an operator; x and dy are cast up in pieces only.

    A token's x is a row of the input, a row of the identity (embedding) or a patch (convolution: its products are again
    convolutions, nothing is unfolded).
    """
    base: Any = layer.base_layer
    (m, n), convolution = layer.matrix_shape, isinstance(base, nn.Conv1d | nn.Conv2d)
    if convolution:
        x, dy = (tensor.reshape(-1, *tensor.shape[1 - base.weight.ndim :]) for tensor in (x, dy))  # images of any batch
        apply, transpose = _patch_products(base)
    elif isinstance(base, nn.Embedding):
        x, dy = x.reshape(-1), dy.reshape(-1, m)
        if base.padding_idx is not None:  # that row has no gradient
            x, dy = x[x != base.padding_idx], dy[x != base.padding_idx]
        apply, transpose = (lambda ids, v: v[ids]), (lambda ids, z: _row_sums(z, ids, n, -1, False))
    else:
        x, dy = x.reshape(-1, n), dy.reshape(-1, m)
        apply, transpose = torch.matmul, (lambda x, z: x.t() @ z)
    wide = torch.float64 if torch.float64 in (x.dtype, dy.dtype) else torch.float32
    step = max(CAST_ELEMENTS * len(x) // max(x.numel() + dy.numel(), 1), 1)
    if not convolution and dy.dtype == wide and x.dtype in (wide, torch.int64, torch.int32):
        step = max(len(x), 1)  # nothing to cast

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for some_x, some_dy in zip(x.split(step), dy.split(step), strict=True):
            tokens = some_dy.movedim(1, -1).reshape(-1, m) if convolution else some_dy
            yield some_x.to(wide) if some_x.is_floating_point() else some_x, tokens.to(wide)

    def matmul(v: Tensor) -> Tensor:
        total, v = v.new_zeros(m, v.shape[1]), v.to(wide)
        for some_x, tokens in pieces():
            total += tokens.t() @ apply(some_x, v)
        return total

    def rmatmul(u: Tensor) -> Tensor:
        total, u = u.new_zeros(n, u.shape[1]), u.to(wide)
        for some_x, tokens in pieces():
            total += transpose(some_x, tokens @ u)
        return total

    return LinearOperator((m, n), matmul, rmatmul, dy.device)


def _patch_products(base: Any) -> tuple[PatchProduct, PatchProduct]:
    def apply(x: Tensor, v: Tensor) -> Tensor:
        found = base._conv_forward(x, v.t().reshape(-1, *base.weight.shape[1:]), None)  # its padding mode included
        return found.movedim(1, -1).reshape(-1, v.shape[1])

    def transpose(x: Tensor, z: Tensor) -> Tensor:
        v = z.new_zeros(math.prod(base.weight.shape[1:]), z.shape[1], requires_grad=True)
        with torch.enable_grad():
            return torch.autograd.grad(apply(x, v), v, z)[0]

    return apply, transpose
