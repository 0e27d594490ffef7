"""Learning rates of adapters: the discrepant rates of Deep LoRA, LoRA+, SGD for outer factors, and a watch on divergence.

Deep LoRA trains ``delta = s left (core[L-1] ... core[0] - tau I) right`` with Adam at the rate ``lr`` for the cores and
``gamma lr`` for left and right. What a user would not guess, measured on STS-B with MiniLM (36 linears, depth 3):

- The core's rate goes down with the rank. Adam moves every entry of a k x k core by about lr a step, so its norm by about
  ``k lr`` where the signs are of one piece and ``2 sqrt(k) lr`` where they are not. The product of three cores grows with the
  cube of that once it leaves its start: in the mode "paper" rank 64 at lr 1e-2 ended at s1(delta) = 16 s1(W), with
  1e-2 * 8 / 64 it trains. Left and right have k columns whose steps add up in the same way, where they are not slow: in the
  mode "aligned" their rate goes down with the root of the rank.
- In the mode "paper" Adam's epsilon is 1e-6, the reference's. At the start the gradient of a core is about
  ``init_scale^2 |G|``, G the gradient of the weight: ``1e-6 |G|`` for depth 3. Below epsilon a step is proportional to it, so
  directions leave the start in the order of their gradient; far above, Adam takes all at the same size, noise included. A
  larger one holds the start: in a regression of width 96 and loss 5e-3 the loss fell within 100 steps with 1e-6 and not in
  300 with 1e-5.
- In the mode "aligned" Adam forgets squared gradients after about 50 steps (beta2 = 0.98). The gradient of a core is about
  ``c^2`` times that of the weight, c the size of the other two, so it grows on the way. Adam with 0.999 divides by the mean
  since the start, and its steps get too long just when the product is most sensitive: with gamma = 0.3 a run ended at a
  correlation of 0.08 that reaches 0.83 with 0.98.
- A head learns at a tenth of the cores' rate: at the same one the paper's mode ended at 0.769 where it reaches 0.787.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4; Hayou et al., ICML 2024, arXiv:2402.12354.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.sgd import sgd

from .analysis import _adapted_layers, base_norm, update_singular_values
from .nn import AdapterLayer
from .processes import gathered

ADAM_EPSILON = 1e-6  # of Deep LoRA's groups in the mode "paper", see above
GAMMA = {"aligned": 0.3, "paper": 1e-2}  # rate of the outer factors over that of the cores, by mode
BETAS = (0.9, 0.98)  # of Adam for Deep LoRA's groups in the mode "aligned", see above
HEAD_SHARE = 0.1  # rate of what is trained beside Deep LoRA over that of the cores, see above
METHODS = ("adam", "sgd")


def parameter_groups(
    model: nn.Module,
    lr: float = 1e-2,
    *,
    gamma: float | None = None,
    weight_decay: float = 0.0,
    loraplus_ratio: float | None = None,
    embedding_lr: float = 1e-6,
    reference_rank: float | None = 8,
    head_lr: float | None = None,
    outer: str = "adam",
) -> list[dict[str, Any]]:
    r"""Every trainable parameter of an adapted model in groups with the rate that its role needs.

    ================================  ==========================================  ====================================
    group (``name``)                  parameters                                  rate
    ================================  ==========================================  ====================================
    ``deeplora.core.<rank>``          cores of that rank                          ``lr * q``
    ``deeplora.outer.<rank>``         left and right                              ``gamma * lr * sqrt(q)``
    ``lora.right`` (A)                                                            ``lr``
    ``lora.left`` (B)                                                             ``lr``, LoRA+: ``loraplus_ratio * lr``
    ``lora.embedding``                both factors of embeddings, LoRA+ only      ``embedding_lr``
    ``randlora``                      the trained diagonals                       ``lr``
    ``other``                         everything else, such as a head             ``head_lr``
    ``other.vectors``                 biases and 1-D parameters, no decay         ``head_lr``, LoRA+: ``loraplus_ratio`` times
    ================================  ==========================================  ====================================

    with ``q = min(1, reference_rank / rank)``; in the mode "paper" left and right have ``gamma * lr`` at every rank.

    Args:
        model: a model with adapters. With ``gamma=0`` its Deep LoRA outer factors stop requiring gradients.
        lr: the base rate; 1e-2 suits Deep LoRA, LoRA wants less (1e-4 to 3e-3).
        gamma: rate of Deep LoRA's outer factors over that of the cores; default 0.3, in the mode "paper" 1e-2. 0 freezes them:
            they are in no group, so no optimizer, weight decay or schedule with a positive floor can move a bit, and no
            gradient is computed.
        weight_decay: of all groups but ``other.vectors`` and the cores of the mode "aligned", whose start is not zero.
        loraplus_ratio: LoRA+, rate of B over that of A, for LoRA layers and vectors; published: 16. None: the same rate.
        embedding_lr: LoRA+'s rate of LoRA embeddings.
        reference_rank: largest rank with the full rates; None for the same rates at every rank.
        head_lr: rate of everything that is no adapter; default ``lr``, beside Deep LoRA in the mode "aligned" ``lr / 10``.
        outer: "sgd" marks Deep LoRA's outer group with ``"method": "sgd"`` for :class:`AdamWithSGD`; others ignore it.

    Returns:
        Groups for any torch optimizer: ``params``, ``lr``, ``weight_decay``, ``name``, for Deep LoRA ``betas`` (0.9, 0.98), in
        the mode "paper" ``eps`` 1e-6 instead (and ``.paper`` at the end of the name where the model has both modes), and
        ``method`` where asked for. No parameter is in two, and every one that requires gradients is in one; there are no empty
        groups.

    Raises:
        ValueError: no adapter layer, no trainable parameter, an argument out of range. Nothing was changed.

    Note:
        The constants have measured reasons, see :mod:`lowrank_kernels.optim`. To train factors again that ``gamma=0``
        froze, activate the adapter again (``set_adapter``). Adapters that are not active are in no group. Call it after
        ``fully_shard``, which replaces the parameters.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> body, head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
        >>> model = torch.nn.Sequential(lrk.nn.DeepLoRALinear(body, rank=16), head)
        >>> for group in lrk.parameter_groups(model):
        ...     print(group["name"], round(group["lr"], 5), len(group["params"]))
        deeplora.outer.16 0.00212 2
        deeplora.core.16 0.005 1
        other 0.001 1
        other.vectors 0.001 1
        >>> optimizer = torch.optim.AdamW(lrk.parameter_groups(model))

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4 (gamma); Hayou et al., ICML 2024, arXiv:2402.12354 (LoRA+).
    """
    numbers = {"lr": lr, "loraplus_ratio": loraplus_ratio, "reference_rank": reference_rank, "head_lr": head_lr}
    for argument, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"parameter_groups: {argument} must be a positive finite number, got {value}")
    for argument, value in {"gamma": gamma or 0.0, "weight_decay": weight_decay, "embedding_lr": embedding_lr}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"parameter_groups: {argument} must be a finite number of at least 0, got {value}")
    if outer not in METHODS:
        raise ValueError(f"parameter_groups: outer must be 'adam' or 'sgd', got {outer!r}")
    layers = _adapted_layers(model, "parameter_groups")
    modes = {info.mode for layer in layers.values() for info in layer.adapters.values() if info.method == "deeplora"}

    if head_lr is None:
        head_lr = HEAD_SHARE * lr if "aligned" in modes else lr
    faster = loraplus_ratio or 1.0
    groups: dict[str, dict[str, Any]] = {}
    frozen: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()

    def add(name: str, rate: float, parameter: nn.Parameter, **options: Any) -> None:
        if not parameter.requires_grad or parameter in seen:
            return
        seen.add(parameter)
        if rate == 0:
            frozen.append(parameter)
            return
        group = {"params": [], "lr": rate, "weight_decay": weight_decay, "name": name, **options}
        groups.setdefault(name, group)["params"].append(parameter)

    for layer in layers.values():
        for adapter, info in layer.adapters.items():
            for kind, parameter in layer.adapter_parameters(adapter).items():
                paper = info.mode == "paper"
                adam: dict[str, Any] = {"eps": ADAM_EPSILON} if paper else {"betas": BETAS}
                share = 1.0 if reference_rank is None else min(1.0, reference_rank / info.rank)
                end = ".paper" if paper and len(modes) > 1 else ""
                if info.method == "deeplora" and kind == "core":
                    decay = {} if paper else {"weight_decay": 0.0}  # it would pull the cores away from where they started
                    add(f"deeplora.core.{info.rank}{end}", share * lr, parameter, **adam, **decay)
                elif info.method == "deeplora":
                    method = {"method": "sgd"} if outer == "sgd" else {}
                    rate = (GAMMA[info.mode] if gamma is None else gamma) * lr * (1.0 if paper else math.sqrt(share))
                    add(f"deeplora.outer.{info.rank}{end}", rate, parameter, **adam, **method)
                elif info.method == "lora" and loraplus_ratio is not None and _is_embedding(layer):
                    add("lora.embedding", embedding_lr, parameter)
                elif info.method == "lora":
                    add(f"lora.{kind}", faster * lr if kind == "left" else lr, parameter)
                else:
                    add(info.method, lr, parameter)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name.endswith("bias"):
            add("other.vectors", faster * head_lr, parameter, weight_decay=0.0)
        else:
            add("other", head_lr, parameter)
    if not groups:
        raise ValueError("parameter_groups: no parameter requires gradients; activate an adapter with set_adapter()")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return list(groups.values())


def _is_embedding(layer: AdapterLayer) -> bool:
    return isinstance(layer.base_layer, nn.Embedding)


class AdamWithSGD(AdamW):
    r"""AdamW, with plain gradient descent on the groups marked ``{"method": "sgd"}``.

    .. math:: p \leftarrow p - \eta\,(g + \lambda p)

    keeps no state: for Deep LoRA's outer factors that saves ``2 (out + in) k`` numbers a layer, nearly all of Adam's.

    Args:
        params: parameters or groups, as from ``parameter_groups(model, outer="sgd")``.
        lr, betas, eps, weight_decay, ...: of :class:`torch.optim.AdamW`, but with weight decay 0 by default.

    Raises:
        ValueError: a group's method is neither "adam" nor "sgd"; what AdamW refuses.

    Note:
        Gradient descent does not scale its steps as Adam does: the outer rate then wants the size of 1 / curvature, larger
        than ``gamma * lr``. ``foreach``, ``fused``, ``maximize``, closures, schedulers, hooks and ``state_dict`` are
        AdamW's; a loaded ``state_dict`` brings its groups' methods along.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> layer = lrk.nn.DeepLoRALinear(torch.nn.Linear(6, 4), rank=2)
        >>> optimizer = lrk.AdamWithSGD(lrk.parameter_groups(layer, outer="sgd"))
        >>> layer(torch.ones(3, 6)).sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.state)  # only the cores have one
        1
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        method = param_group.setdefault("method", "adam")
        if method not in METHODS:
            raise ValueError(f"AdamWithSGD: a group's method must be 'adam' or 'sgd', got {method!r}")
        super().add_param_group(param_group)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """AdamW's step collects each group here; a group that descends is done at once and leaves Adam's lists empty."""
        if group.get("method") != "sgd":
            return super()._init_group(group, *lists)
        parameters = [p for p in group["params"] if p.grad is not None]
        sgd(
            parameters,
            [p.grad for p in parameters],
            [None] * len(parameters),
            has_sparse_grad=any(p.grad.is_sparse for p in parameters),
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            weight_decay=group["weight_decay"],
            momentum=0.0,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=group["maximize"],
        )
        return False


class DivergenceWatch:
    """What :func:`watch_divergence` returns: ``ratios`` by layer after so many ``looks``; ``remove()`` ends it."""

    def __init__(self, layers: dict[str, AdapterLayer], every: int, limit: float) -> None:
        self.ratios: dict[str, float] = {}
        self.looks = 0
        self._layers, self._every, self._limit = layers, every, limit
        self._steps = 0
        self._bases: dict[str, float] = {}
        self._warned: set[str] = set()
        self._hook: Any = None

    def remove(self) -> None:
        """Stop watching; twice is once."""
        if self._hook is not None:
            self._hook.remove()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps += 1
        if self._steps % self._every:
            return
        with torch.no_grad():
            for name, layer in self._layers.items():
                base = self._base(name)
                with gathered(*(child for child in layer.children() if child is not layer.base_layer)):
                    self.ratios[name] = _ratio(layer, base)
        self.looks += 1
        for name, ratio in self.ratios.items():
            if not ratio <= self._limit and name not in self._warned:
                self._warned.add(name)
                self._warn(name or "(the model)", ratio)

    def _base(self, name: str) -> float:
        if name not in self._bases:
            with gathered(self._layers[name].base_layer):
                self._bases[name] = base_norm(self._layers[name])
        return self._bases[name]

    def _warn(self, name: str, ratio: float) -> None:
        if math.isnan(ratio):
            found = "has NaN or infinity: training diverged"
        else:
            found = (
                f"has s1(delta) = {ratio:.3g} s1(W), above {self._limit:g} s1(W): it outweighs what the layer learned before, "
                "training may be diverging"
            )
        warnings.warn(
            f"watch_divergence: after {self._steps} steps the update of {name} {found}. If the loss does not fall, lower lr "
            "(the core's rate goes down with the rank: parameter_groups(reference_rank=8)), clip gradients, or start anew with "
            "a smaller rank",
            stacklevel=4,
        )


def _ratio(layer: AdapterLayer, base: float) -> float:
    """s1(delta) / s1(W) of the largest active adapter; NaN if not finite, 0 without one or where a zero W sets no scale."""
    ratios = [0.0]
    for adapter in layer.active_adapters:
        factors = layer.factors(adapter)
        dtype = torch.float64 if factors.left.dtype == torch.float64 else torch.float32
        ratios.append(float(update_singular_values(factors, dtype)[0]))
    largest = math.nan if any(map(math.isnan, ratios)) else max(ratios)
    return largest / base if base else 0.0 * largest


def watch_divergence(model: nn.Module, optimizer: Optimizer, *, every: int = 20, limit: float = 5.0) -> DivergenceWatch:
    r"""Warn once per layer whose update outgrows its frozen weight, :math:`s_1(\Delta) > limit \cdot s_1(W)`.

    Args:
        model: a model with adapters.
        optimizer: it is watched through a hook after its steps; nothing is changed.
        every: steps between two looks.
        limit: largest accepted ratio. Trained updates mostly stay below 1; far beyond it the layer no longer does what
            it was pretrained for.

    Returns:
        A handle with ``ratios`` (layer name -> ratio as last measured), ``looks`` (how many there were) and ``remove()``.

    Raises:
        ValueError: no adapter layer, ``every`` below 1, a limit that is not positive.

    Warns:
        UserWarning: names the layer, the ratio and what to do; also where an update is not finite.

    Note:
        A look costs two thin QRs and a k x k SVD a layer, O((out + in) k^2), in float32 (float64 for float64), and one
        synchronisation a layer on a GPU. s1(W) is computed once per layer. Layers whose weight is zero are left out. Of
        several active adapters the largest counts. Of a sharded model every process watches; the factors are gathered layer
        by layer.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = lrk.adapt(model, rank=2)
        >>> optimizer = torch.optim.AdamW(lrk.parameter_groups(model))
        >>> watch = lrk.watch_divergence(model, optimizer, every=1)
        >>> model(torch.ones(3, 6)).sum().backward()
        >>> optimizer.step()
        >>> 0 < watch.ratios["0"] < 0.1
        True
        >>> watch.remove()
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"watch_divergence: every must be an integer of at least 1, got {every!r}")
    if not limit > 0:
        raise ValueError(f"watch_divergence: limit must be positive, got {limit}")
    watch = DivergenceWatch(_adapted_layers(model, "watch_divergence"), every, limit)
    watch._hook = optimizer.register_step_post_hook(watch._after_step)
    return watch
