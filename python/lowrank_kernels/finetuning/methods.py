"""The ways to adapt, each a few lines: its options with their defaults, and what puts it into a model.

A new method is one more entry of :data:`METHODS`: a build function changes ``setup.model.encoder``, whose parameters are all
frozen when it is called, and returns the optimizer's groups without the head's. Everything else, the head, the batches, the
number of steps, the schedule, is the same for all.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import adapt, adapter_layers
from ..analysis import RankReport, rank_report
from ..files import InputError, extra
from ..initialization import compress_
from ..nn import LoRALinear
from ..optim import ADAM_EPSILON, GAMMA, parameter_groups
from .models import TextModel

Groups = list[dict[str, Any]]
Value = float | int | str


@dataclass
class Setup:
    """What a build function gets."""

    model: TextModel
    linears: Sequence[str]  # names below model.encoder of the layers to adapt
    options: Mapping[str, Any]
    seed: int
    loss: Callable[[], Tensor]  # of the first batch


@dataclass(frozen=True)
class Method:
    """One way to adapt a model."""

    name: str
    title: str
    build: Callable[[Setup], Groups]
    defaults: Mapping[str, Value] = field(default_factory=dict)  # the options that it takes


# ---------------------------------------------------------------------- options


@dataclass(frozen=True)
class Option:
    """How an option is read from text, and what it may be."""

    kind: type
    what: str
    allowed: Callable[[Any], bool]


def _positive(x: Any) -> bool:
    return 0 < x < math.inf


OPTIONS: dict[str, Option] = {
    "rank": Option(int, "an integer of at least 1", lambda x: x >= 1),
    "depth": Option(int, "an integer of at least 1", lambda x: x >= 1),
    "lr": Option(float, "a positive number", _positive),
    "gamma": Option(float, "a number of at least 0", lambda x: 0 <= x < math.inf),
    "init_scale": Option(float, "a number, 0 for the mode's own at this depth", lambda x: 0 <= x < math.inf),
    "adam_eps": Option(float, "a positive number", _positive),
    "alpha": Option(float, "a positive number", _positive),
    "ratio": Option(float, "a positive number", _positive),
    "dropout": Option(float, "a number from 0 to below 1", lambda x: 0 <= x < 1),
    "reference_rank": Option(float, "a number, 0 for the same rate at every rank", lambda x: 0 <= x < math.inf),
    "head_first": Option(float, "the share of the steps for the head alone, from 0 to below 1", lambda x: 0 <= x < 1),
    "outer": Option(str, "adam or sgd", lambda x: x in ("adam", "sgd")),
}


def parse_option(name: str, text: str) -> Value:
    """A value from the command line, checked."""
    option = OPTIONS[name]
    try:
        value = option.kind(text)
    except ValueError:
        value = None
    if value is None or not option.allowed(value):
        raise InputError(f"--method: {name} must be {option.what}, got {text!r}")
    return value


# ---------------------------------------------------------------------- what is built


def _head(setup: Setup) -> Groups:
    return []


def _adapted(setup: Setup, **options: Any) -> nn.Module:
    """The encoder with adapters of this package in all its linears."""
    o, encoder = setup.options, setup.model.encoder
    adapt(encoder, o["rank"], target_modules=list(setup.linears), dropout=o["dropout"], seed=setup.seed, **options)
    return encoder


def _deep(setup: Setup, mode: str = "aligned", compressed: bool = True) -> Groups:
    o = setup.options
    encoder = _adapted(setup, depth=o["depth"], mode=mode, init_scale=o["init_scale"] or None)
    if compressed:
        compress_(encoder, setup.loss, seed=setup.seed)
    reference = o["reference_rank"] or None
    return parameter_groups(encoder, o["lr"], gamma=o["gamma"], reference_rank=reference, outer=o["outer"])


def _lora(setup: Setup) -> Groups:
    o = setup.options
    encoder = _adapted(setup, method="lora", alpha=o["alpha"])
    return parameter_groups(encoder, o["lr"], loraplus_ratio=o.get("ratio"))


def _paper_lora(setup: Setup) -> Groups:
    """The paper's code: the factor on the output side is N(0, 1), the one on the input side zero, and alpha / r = 1."""
    o = setup.options
    encoder = _adapted(setup, method="lora", alpha=float(o["rank"]))
    generator = torch.Generator().manual_seed(setup.seed)
    for layer in adapter_layers(encoder).values():
        right = torch.zeros(o["rank"], layer.matrix_shape[1])
        layer.set_factors("default", torch.randn(layer.matrix_shape[0], o["rank"], generator=generator), None, right)
    return parameter_groups(encoder, o["lr"])


def _peft_lora(setup: Setup) -> Groups:
    """The library itself: its layers, its start, its scale."""
    o, model, peft = setup.options, setup.model, extra("peft", "the method peft-lora")
    config = peft.LoraConfig(r=o["rank"], lora_alpha=o["alpha"], lora_dropout=o["dropout"], target_modules=list(setup.linears))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
        model.encoder = peft.get_peft_model(model.encoder, config)
    return [{"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": o["lr"]}]


def _randlora(setup: Setup) -> Groups:
    o = setup.options
    return parameter_groups(_adapted(setup, method="randlora", alpha=o["alpha"]), o["lr"])


class FullWidthLinear(nn.Module):
    """``y = x W^T + b + x (W_L ... W_1)^T`` with factors as wide as the layer's larger side, as before compression.

    Every factor starts as ``init_scale`` times an orthogonal matrix.
    """

    def __init__(self, base_layer: nn.Linear, depth: int, init_scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        rows, columns = base_layer.weight.shape
        widths = [columns, *[max(rows, columns)] * (depth - 1), rows]
        self.factors = nn.ParameterList()
        for wide_in, wide_out in itertools.pairwise(widths):
            drawn = nn.init.orthogonal_(torch.empty(wide_out, wide_in), init_scale, generator=generator)
            self.factors.append(nn.Parameter(drawn.to(base_layer.weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        update = x
        for factor in self.factors:
            update = nn.functional.linear(update, factor)
        return self.base_layer(x) + update

    def delta(self) -> Tensor:
        """The update of the weight, float64."""
        product = self.factors[0].detach().double()
        for factor in list(self.factors)[1:]:
            product = factor.detach().double() @ product
        return product


def _full_width(setup: Setup) -> Groups:
    o, encoder = setup.options, setup.model.encoder
    generator = torch.Generator().manual_seed(setup.seed)
    for name in setup.linears:
        parent, _, key = name.rpartition(".")
        base: Any = encoder.get_submodule(name)
        setattr(encoder.get_submodule(parent), key, FullWidthLinear(base, o["depth"], o["init_scale"], generator))
    return [{"params": [p for p in encoder.parameters() if p.requires_grad], "lr": o["lr"]}]


HEAD_FIRST = 0.1  # share of the steps
_LORA: dict[str, Value] = {"rank": 8, "lr": 1e-3, "alpha": 8.0, "dropout": 0.0, "adam_eps": 1e-8}
_PAPER: dict[str, Value] = {
    "rank": 8, "depth": 3, "lr": 1e-2, "gamma": GAMMA["paper"], "init_scale": 1e-3, "dropout": 0.0, "adam_eps": ADAM_EPSILON,
    "outer": "adam", "reference_rank": 8.0,
}  # fmt: skip
_DEEP: dict[str, Value] = {
    **_PAPER, "gamma": GAMMA["aligned"], "init_scale": 0.0, "adam_eps": 1e-8, "head_first": HEAD_FIRST
}  # fmt: skip

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("head", "head only", _head),
        Method(
            "lora-paper", "LoRA as in the paper", _paper_lora, {"rank": 8, "lr": 1e-4, "dropout": 0.0, "adam_eps": ADAM_EPSILON}
        ),
        Method("peft-lora", "LoRA of PEFT", _peft_lora, _LORA),
        Method("peft-lora-head", "LoRA of PEFT, head first", _peft_lora, {**_LORA, "head_first": HEAD_FIRST}),
        Method("lora", "LoRA", _lora, _LORA),
        Method("loraplus", "LoRA+", _lora, {**_LORA, "lr": 1e-4, "ratio": 16.0}),
        Method("deeplora", "Deep LoRA", _deep, _DEEP),
        Method("deeplora-random", "Deep LoRA, random subspace", lambda setup: _deep(setup, compressed=False), _DEEP),
        Method("deeplora-paper", "Deep LoRA as in the paper", lambda setup: _deep(setup, "paper"), _PAPER),
        Method(
            "deeplora-paper-random",
            "Deep LoRA as in the paper, random subspace",
            lambda setup: _deep(setup, "paper", compressed=False),
            _PAPER,
        ),
        Method(
            "deeplora-full",
            "Deep LoRA, full width",
            _full_width,
            {"depth": 3, "lr": 1e-4, "init_scale": 1e-3, "adam_eps": ADAM_EPSILON},
        ),
        Method("randlora", "RandLoRA", _randlora, {"rank": 32, "lr": 1e-3, "alpha": 64.0, "dropout": 0.0, "adam_eps": 1e-8}),
    )
}


def build(method: Method, setup: Setup) -> Groups:
    """Put a method into the model; its groups, with its Adam's epsilon."""
    torch.manual_seed(setup.seed)  # PEFT draws from torch's own generator
    try:
        groups = method.build(setup)
    except ValueError as error:
        raise InputError(f"--method {method.name}: {error}") from error
    for group in groups:
        group["eps"] = setup.options["adam_eps"]
    return groups


# ---------------------------------------------------------------------- what was learnt


def update_ranks(encoder: nn.Module) -> RankReport | None:
    """:func:`lowrank_kernels.rank_report` of an encoder that any method adapted; None without adapters."""
    if adapter_layers(encoder):
        return rank_report(encoder)
    names, twins = [], nn.ModuleList()
    for name, module in encoder.named_modules():
        factors = _plain_lora(module)
        if factors is not None:
            base, left, right = factors
            twin = LoRALinear.from_linear(base, rank=left.shape[1], alpha=float(left.shape[1]))
            twin.set_factors("default", left, None, right)
            twins.append(twin)
            names.append(name.removeprefix("base_model.model."))
    if not names:
        return None
    report = rank_report(twins)
    rows = tuple(_renamed(row, name) for row, name in zip(report.layers, names, strict=True))
    return RankReport(rows, report.absolute, report.relative)


def _renamed(row: Any, name: str) -> Any:
    return type(row)(**{**row.__dict__, "name": name})


def _plain_lora(module: Any) -> tuple[nn.Linear, Tensor, Tensor] | None:
    """Base layer and update as ``left @ right`` of PEFT's LoRA layers and of full width ones."""
    if isinstance(module, FullWidthLinear):
        delta = module.delta()
        if not bool(torch.isfinite(delta).all()):
            return module.base_layer, torch.full((delta.shape[0], 1), math.nan), torch.ones(1, delta.shape[1])
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return module.base_layer, u * s, vh
    if "default" in getattr(module, "lora_A", ()) and hasattr(module, "base_layer"):
        b, a = module.lora_B["default"].weight.detach().double(), module.lora_A["default"].weight.detach().double()
        return module.base_layer, b * module.scaling["default"], a
    return None
