"""Adapters for a whole model: put low-rank layers in the place of its own layers, and take them out again.

:func:`adapt` freezes the model and replaces the layers it targets by :class:`~lowrank_kernels.nn.AdapterLayer` in place; the
original modules live on inside as ``base_layer``. :func:`unadapt` puts the same objects back, :func:`merge_and_unload` puts
them back with the update added to their weights. Everything is checked before anything is replaced.

What was trainable before is remembered on the model by parameter name, so that copies and pickles of the model keep it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .nn import AdapterLayer, layer_class
from .nn.hosts import Linear
from .nn.methods import MODES
from .processes import sharding_team

METHODS = ("deeplora", "lora", "randlora")
Pattern = str | Iterable[str]
_MEMORY = "_lowrank_kernels_memory"  # attribute of the model that adapt() was called on


@dataclass
class _Memory:
    requires_grad: dict[str, bool]  # by the names that parameters have without adapters
    trained: tuple[str, ...] = ()  # modules that are trained in full beside the adapters


class _Place(NamedTuple):
    parent: nn.Module
    key: str
    module: nn.Module


class AdaptedLayer(NamedTuple):
    """One row of an :class:`AdaptReport`."""

    shape: tuple[int, int]  # (out, in) of the update
    rank: int
    parameters: int  # of the adapter, in this layer


@dataclass(frozen=True)
class AdaptReport:
    """What :func:`adapt` did: the adapted layers, those that were matched but skipped and why, and the parameter counts."""

    adapter: str
    method: str
    layers: dict[str, AdaptedLayer]
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.layers)

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[int, int], int], list[int]] = {}
        for name, layer in self.layers.items():
            groups.setdefault((_starred(name), layer.shape, layer.rank), []).append(layer.parameters)
        width = max(len(pattern) for pattern, _, _ in groups)
        lines = [f"adapter {self.adapter!r}, {self.method}, in {len(self.layers)} layers:"]
        for (pattern, (rows, columns), rank), counts in groups.items():
            size = f"{rows} x {columns}"
            lines.append(f"  {len(counts):>3} {pattern:<{width}}  {size:>13}  rank {rank:<3} {sum(counts):>11,} parameters")
        reasons = Counter((_starred(name), reason) for name, reason in self.skipped.items())
        lines += [f"  skipped {count} {pattern}: {reason}" for (pattern, reason), count in reasons.items()]
        share = 100 * self.trainable / max(self.total, 1)
        return "\n".join([*lines, f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.3g} %)"])


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def adapt(
    model: nn.Module,
    rank: int = 8,
    depth: int = 3,
    target_modules: Pattern = "all-linear",
    *,
    method: str = "deeplora",
    exclude_modules: Pattern | None = None,
    modules_to_train: Pattern = (),
    adapter: str = "default",
    mode: str | None = None,
    init_scale: float | None = None,
    alpha: float | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    strict: bool = False,
) -> AdaptReport:
    r"""Freeze a model and put trainable low-rank layers in the place of the layers it targets.

    .. math:: W \to W + scale \cdot left \; (core_{depth-1} \cdots core_0 - \tau I) \; right

    Args:
        model: changed in place; any ``nn.Module`` that holds the targeted layers (it cannot be one of them itself).
        rank: inner width of every adapter, at most the smaller side of its layer; even for the paper's ``compress_``.
        depth: number of cores, for ``method="deeplora"``.
        target_modules: ``"all-linear"``: every ``nn.Linear`` and Hugging Face ``Conv1D`` but the output embedding, where the
            model names it (``get_output_embeddings``); a list of names or ends of names; or one regular expression that
            matches whole names. Named layers may also be ``nn.Embedding``, ``nn.Conv1d`` and ``nn.Conv2d``.
        method: ``"deeplora"``, ``"lora"`` or ``"randlora"``.
        exclude_modules: the same, of layers to leave alone, or of modules to leave alone with all that is inside.
        modules_to_train: the same, of modules that are trained in full beside the adapters, such as a new head.
        adapter: name of the adapter; a second name adds a second adapter to the model, and makes it the active one.
        mode: for ``"deeplora"``: ``"aligned"``, the default, starts the update at zero (tau = ``init_scale^depth``) where its
            gradient is large; ``"paper"`` starts it as the paper does, tiny and on a plateau (tau = 0).
        init_scale: for ``"deeplora"``: every core starts as ``init_scale`` times the identity; default by mode and depth, see
            :class:`~lowrank_kernels.nn.DeepLoRALinear`.
        alpha: for ``"lora"`` and ``"randlora"``: the scale is ``alpha / rank``; default their own.
        scale: for ``"deeplora"``.
        dropout: probability with which entries of the layer's input are dropped on the adapter's path, in training.
        dtype: of the factors; default float32 for half-precision layers, else the layer's.
        seed: every layer draws its start from ``(seed, its name)``, so neither order nor selection matters.
        rank_pattern: rank of the layers whose name, or end of name, matches the regular expression; the first match counts.
        strict: an error where a matched layer cannot be adapted, instead of a reason in the report.

    Returns:
        The report: ``adapted``, ``skipped`` with reasons, ``trainable`` and ``total`` parameters; ``print`` it.

    Raises:
        ValueError: a pattern that matches nothing (with the nearest names), an adapter name already in use, a rank larger
            than a layer, nothing left to adapt, a model that PEFT adapted or accelerate offloads. The model is as it was then.

    Note:
        Skipped with the reason: quantized and parametrized layers, subclasses of the known ones, tied weights, and those
        whose weight another module reads past ``forward`` (``nn.MultiheadAttention.out_proj``; the linears of
        ``nn.TransformerEncoderLayer`` while its fast path is enabled). A layer under several names becomes one. On a meta
        model the factors are on meta too: give them storage with ``to_empty`` and values with ``reset_parameters`` or
        :func:`lowrank_kernels.load_adapter`.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> print(lrk.adapt(model, rank=2, modules_to_train=["2"]))
        adapter 'default', deeplora, in 1 layers:
            1 *        32 x 16  rank 2           108 parameters
          skipped 1 *: trained in full (modules_to_train)
        trainable: 240 of 784 parameters (30.6 %)
        >>> lrk.unadapt(model)
        >>> type(model[0])
        <class 'torch.nn.modules.linear.Linear'>

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4.
    """
    if method not in METHODS:
        raise ValueError(f"adapt: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if mode not in (None, *MODES):
        raise ValueError(f"adapt: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if method == "deeplora" and alpha is not None:
        raise ValueError(f"adapt: alpha belongs to method='lora', got alpha={alpha} with method='deeplora'; use scale")
    if method != "deeplora" and (mode is not None or init_scale is not None):
        name, value = ("mode", mode) if mode is not None else ("init_scale", init_scale)
        raise ValueError(f"adapt: {name} belongs to method='deeplora', got {name}={value!r} with method={method!r}")
    if method != "deeplora" and scale != 1.0:
        raise ValueError(f"adapt: scale belongs to method='deeplora', got scale={scale} with method={method!r}; use alpha")
    check_free("adapt", model, adapter)
    names = first_names(model)
    trained = _matching("modules_to_train", modules_to_train, model)
    held = [name for name in names if isinstance(names[name], AdapterLayer) and within(name, trained)]
    if held:
        raise ValueError(f"adapt: modules_to_train holds adapted layers, such as {held[0]}; leave them out or unadapt() first")
    candidates, left_out, refused = _targets(model, method, names, target_modules, exclude_modules, trained)
    if strict and refused:
        raise ValueError(
            f"adapt: strict=True, and {len(refused)} of the targeted layers cannot be adapted: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        )
    skipped = {**left_out, **refused}
    if not candidates:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
        raise ValueError(f"adapt: target_modules={target_modules!r} leaves nothing to adapt: {reasons or 'no such layer'}")
    ranks = _ranks(candidates, rank, rank_pattern or {})
    common: dict[str, Any] = {"method": method, "dropout": dropout, "dtype": dtype}
    if method == "deeplora":
        common |= {"depth": depth, "mode": mode or "aligned", "init_scale": init_scale, "scale": scale}
    elif alpha is not None:
        common["alpha"] = alpha
    plan = {name: {**common, "rank": ranks[name]} for name in candidates}
    install(model, plan, adapter, seed=seed, trained=trained)
    return report_of(model, adapter, skipped)


def _seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------------- what to adapt


def _places(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, _Place]]:
    """Every name below a module, also second names of shared modules; nothing inside an adapted layer, ours or PEFT's."""
    for key, child in module._modules.items():
        if child is not None:
            yield prefix + key, _Place(module, key, child)
            if not isinstance(child, AdapterLayer) and not _is_peft(child):
                yield from _places(child, f"{prefix}{key}.")


def _is_peft(module: nn.Module) -> bool:
    return hasattr(type(module), "adapter_layer_names")


def first_names(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, each module under its first name; nothing inside an adapted layer."""
    names: dict[int, tuple[str, nn.Module]] = {}
    for name, place in _places(model):
        names.setdefault(id(place.module), (name, place.module))
    return dict(names.values())


def _matching(argument: str, pattern: Pattern, model: nn.Module, only: Iterable[nn.Module] | None = None) -> list[str]:
    """First names of the modules that a list of names or endings, or a regular expression over whole names, means."""
    allowed = None if only is None else set(map(id, only))
    modules = {name: place.module for name, place in _places(model) if allowed is None or id(place.module) in allowed}
    names = list(modules)
    if isinstance(pattern, str):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"adapt: {argument}={pattern!r} is not a regular expression: {error}") from None
        hits = {pattern: [name for name in names if expression.fullmatch(name)]}
        rule = "as a regular expression over whole names; for ends of names pass a list"
    else:
        hits = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in pattern}
        rule = "as a name or the end of one"
    for given, found in hits.items():
        if not found:
            near = nearest(given, names)
            raise ValueError(f"adapt: {argument} {given!r} matches no module, {rule}; the nearest names are {near}")
    wanted = {id(modules[name]) for found in hits.values() for name in found}
    return [name for name, module in first_names(model).items() if id(module) in wanted]


def within(name: str, heads: Iterable[str]) -> bool:
    """Whether it is one of these modules or inside one."""
    return any(f"{name}.".startswith(f"{head}.") for head in heads)


def nearest(given: str, names: Iterable[str], count: int = 3) -> str:
    """The names, and last parts of names, that look most like ``given``."""
    choices = dict.fromkeys(part for name in names for part in (name.rpartition(".")[2], name) if not part.isdigit())
    return ", ".join(map(repr, difflib.get_close_matches(given, choices, count, 0.0)))


def _is_linear(module: nn.Module) -> bool:
    """Linear layers of every kind, quantized ones included; which of them can be adapted is asked later."""
    base = module.base_layer if isinstance(module, AdapterLayer) else module
    has_width = hasattr(base, "in_features") or hasattr(base, "infeatures")
    return Linear._hosts(base) or (has_width and "linear" in type(base).__name__.lower())


def _is_layer(module: nn.Module) -> bool:
    """What a target can mean: no container, and nothing without parameters such as a dropout or an activation."""
    hosts = (AdapterLayer, nn.Embedding, nn.Conv1d, nn.Conv2d)
    leaf = not module._modules and any(parameter is not None for parameter in module._parameters.values())
    return leaf or isinstance(module, hosts) or _is_linear(module) or _is_peft(module)


def unsupported(module: nn.Module, method: str) -> str | None:
    """Why the module cannot take an adapter of the method, or None."""
    if isinstance(module, AdapterLayer):
        return None if module.method == method else f"it holds {module.method} adapters, and a layer takes one method"
    if _is_peft(module):
        return "it is adapted by PEFT"
    try:
        layer_class(module, method)
    except TypeError as error:
        return str(error).removeprefix("layer_class: the layer ")
    return None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a layer that can be adapted or is."""
    return module.matrix_shape if isinstance(module, AdapterLayer) else layer_class(module)._matrix_shape(module)


def _targets(
    model: nn.Module,
    method: str,
    names: dict[str, nn.Module],
    wanted: Pattern,
    exclude: Pattern | None,
    trained: Sequence[str],
) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, str]]:
    """The layers to adapt; with the reason, those that are to be left out; and those that cannot be adapted."""
    if wanted == "all-linear":
        matched = [name for name, module in names.items() if _is_linear(module)]
    else:
        matched = _matching("target_modules", wanted, model, filter(_is_layer, names.values()))
    excluded = () if exclude is None else _matching("exclude_modules", exclude, model)
    trained = [*trained_modules(model), *trained]
    outputs = set(_output_embeddings(model)) if wanted == "all-linear" else set()
    owners: dict[int, list[str]] = {}
    readers: dict[int, str] = {}  # id of a layer -> which module reads its weight past forward()
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
        if isinstance(module, nn.MultiheadAttention):
            readers |= dict.fromkeys(map(id, module.children()), "its nn.MultiheadAttention reads its weight past forward()")
        if isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            readers |= dict.fromkeys(
                map(id, module.children()),
                "nn.TransformerEncoderLayer reads its weight past forward() in inference; call "
                "torch.backends.mha.set_fastpath_enabled(False) before adapt(), and leave it so",
            )
    adapted, left_out, refused = {}, {}, {}
    for name in matched:
        module = names[name]
        if within(name, excluded):
            left_out[name] = "excluded (exclude_modules)"
        elif within(name, trained):
            left_out[name] = "trained in full (modules_to_train)"
        elif id(module) in outputs:
            left_out[name] = "the output embedding"
        elif id(module) in readers:
            refused[name] = readers[id(module)]
        elif reason := unsupported(module, method):
            refused[name] = reason
        elif others := [owner for owner in owners[id(module.weight)] if owner not in (name, f"{name}.base_layer")]:
            refused[name] = f"its weight is tied to that of {others[0]}"
        else:
            adapted[name] = module
    return adapted, left_out, refused


def _output_embeddings(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                yield id(getter())
            except (AttributeError, NotImplementedError):  # transformers declares it where it is not defined
                continue


def _ranks(layers: dict[str, nn.Module], rank: int, pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank of every layer, each no larger than the layer."""
    ranks = dict.fromkeys(layers, rank)
    for expression, value in reversed(list(pattern.items())):  # the first match counts
        hits = [name for name in layers if re.fullmatch(rf"(.*\.)?({expression})", name)]
        if not hits:
            near = nearest(expression, layers)
            raise ValueError(f"adapt: rank_pattern {expression!r} matches no adapted layer; the nearest names are {near}")
        ranks |= dict.fromkeys(hits, value)
    for value in (rank, *pattern.values()):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"adapt: rank must be an integer of at least 1, got {value!r}")
    shapes = {name: matrix_shape(layers[name]) for name in layers}
    small = [f"{name} {shapes[name]}" for name in layers if ranks[name] > min(shapes[name])]
    if small:
        more = f" and {len(small) - 8} more" if len(small) > 8 else ""
        raise ValueError(
            f"adapt: rank {max(ranks[name] for name in layers if ranks[name] > min(shapes[name]))} is larger than "
            f"{', '.join(small[:8])}{more}; give these a smaller rank by rank_pattern or leave them out by exclude_modules"
        )
    return ranks


# ---------------------------------------------------------------------- putting in and taking out


def check_free(function: str, model: nn.Module, adapter: str) -> None:
    """Refuse a model that cannot take an adapter of this name now."""
    if not isinstance(model, AdapterLayer) and unsupported(model, "deeplora") is None:
        raise ValueError(
            f"{function}: the model is itself a {type(model).__name__}, which cannot be replaced in place; put it into an "
            f"nn.Sequential, or wrap it by {layer_class(model).__name__} from lowrank_kernels.nn"
        )
    if isinstance(model, AdapterLayer):
        raise ValueError(f"{function}: the model is itself an adapted layer; use its add_adapter()")
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError(f"{function}: the model has lazy layers without parameters yet; call the model once first")
    offloaded = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook") and _on_meta(module)]
    if offloaded:
        raise ValueError(
            f"{function}: accelerate keeps the weights of {len(offloaded)} modules, such as {offloaded[0]}, elsewhere between "
            "calls (offloading), where adapters cannot follow; load the model without offloading"
        )
    layers = adapter_layers(model)
    refuse_peft(function, layers)
    taken = [name for name, layer in layers.items() if adapter in layer.adapters]
    if taken:
        raise ValueError(
            f"{function}: the model is already adapted: {len(taken)} layers, such as {taken[0]}, have an adapter {adapter!r}; "
            "give another name by adapter=, or delete_adapter() or unadapt() first"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{function}: adapters are merged in {len(merged)} layers, such as {merged[0]}; unmerge() them first")


_PEFT_METHODS = (
    "use the methods of its model: add_adapter(), load_adapter(), set_adapter(), delete_adapter(), unload(), merge_and_unload()"
)


def _on_meta(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())


def refuse_peft(function: str, layers: Mapping[str, AdapterLayer], instead: str = _PEFT_METHODS) -> None:
    """PEFT's model keeps a record of the adapters of its layers, so they come and go by its own methods."""
    theirs = [name for name, layer in layers.items() if _is_peft(layer)]
    if theirs:
        raise ValueError(f"{function}: the adapters of {len(theirs)} layers, such as {theirs[0]}, are PEFT's; {instead}")


def install(
    model: nn.Module, plan: dict[str, dict[str, Any]], adapter: str, *, seed: int = 0, trained: Sequence[str] = ()
) -> None:
    """Put adapters with the options ``plan[name]`` into a model, all or none, make them active and freeze the rest."""
    names = first_names(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    original = _original_flags(model)
    made: dict[int, AdapterLayer] = {}
    added: list[AdapterLayer] = []
    try:
        for name, given in plan.items():
            module, options = names[name], dict(given)
            method, generator = options.pop("method"), _seeded(seed, name)
            if isinstance(module, AdapterLayer):
                module.add_adapter(adapter, **options, generator=generator)
                added.append(module)
            else:
                cls = layer_class(module, method)
                made[id(module)] = cls.from_module(module, adapter=adapter, **options, generator=generator)
    except BaseException:
        for layer in added:
            layer.delete_adapter(adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        raise
    model.__dict__.setdefault(_MEMORY, _Memory(original))
    for _, place in list(_places(model)):
        if id(place.module) in made:
            place.parent._modules[place.key] = made[id(place.module)]
    set_adapter(model, adapter)
    layers = adapter_layers(model).values()
    free = {id(p) for layer in layers for name in layer.adapters for p in layer.adapter_parameters(name).values()}
    for parameter in model.parameters():
        if id(parameter) not in free:
            parameter.requires_grad_(False)
    train_in_full(model, trained)


def train_in_full(model: nn.Module, names: Sequence[str]) -> None:
    """Train these modules of an adapted model in full, beside those that are already."""
    memory: _Memory = model.__dict__.setdefault(_MEMORY, _Memory(_original_flags(model)))
    memory.trained = tuple(dict.fromkeys((*memory.trained, *names)))
    for name in trained_modules(model):
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def _original_flags(model: nn.Module) -> dict[str, bool]:
    """``requires_grad`` by the names without adapters; where a part of the model was adapted before, as it was before that."""
    flags = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        flags[name.replace(".base_layer.", ".")] = parameter.requires_grad
    for prefix, module in reversed(list(model.named_modules())):  # the outermost memory last: it looked inside when it began
        if _MEMORY in module.__dict__:
            inner = module.__dict__[_MEMORY].requires_grad
            flags |= {f"{prefix}.{name}".removeprefix("."): flag for name, flag in inner.items()}
    return flags


def trained_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are trained in full beside the adapters, also where a part of the model was adapted."""
    found: dict[str, None] = {}
    for prefix, module in model.named_modules():
        memory: _Memory | None = module.__dict__.get(_MEMORY)
        found |= dict.fromkeys(f"{prefix}.{name}".removeprefix(".") for name in (memory.trained if memory else ()))
    return tuple(found)


def report_of(model: nn.Module, adapter: str, skipped: dict[str, str] | None = None) -> AdaptReport:
    """The report of an adapter that a model has."""
    layers = {name: layer for name, layer in adapter_layers(model).items() if adapter in layer.adapters}
    rows = {
        name: AdaptedLayer(
            layer.matrix_shape,
            layer.adapters[adapter].rank,
            sum(parameter.numel() for parameter in layer.adapter_parameters(adapter).values()),
        )
        for name, layer in layers.items()
    }
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    method = next(iter(layers.values())).method
    return AdaptReport(adapter, method, rows, skipped or {}, trainable, total)


def _put_back(model: nn.Module, layers: Iterable[AdapterLayer]) -> None:
    """The original modules in the places of their adapters; without any adapter left, the flags of the parameters too."""
    wanted = {id(layer) for layer in layers}
    for _, place in list(_places(model)):
        if id(place.module) in wanted:
            place.parent._modules[place.key] = place.module.base_layer  # type: ignore[assignment]
    for module in reversed(list(model.modules())):  # adapt() may have been called on a part of this model; the whole comes last
        if _MEMORY in module.__dict__ and not adapter_layers(module):
            memory: _Memory = module.__dict__.pop(_MEMORY)
            for name, parameter in module.named_parameters(remove_duplicate=False):
                parameter.requires_grad_(memory.requires_grad.get(name, parameter.requires_grad))


def _adapted(function: str, model: nn.Module) -> dict[str, AdapterLayer]:
    layers = adapter_layers(model)
    if not layers or isinstance(model, AdapterLayer):
        raise ValueError(f"{function}: the model holds no adapted layer; call adapt(model) first")
    return layers


def _changeable(function: str, model: nn.Module) -> dict[str, AdapterLayer]:
    """Adapted layers whose adapters are not PEFT's to change."""
    layers = _adapted(function, model)
    refuse_peft(function, layers)
    return layers


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers of a model by name; a shared layer once, under its first name.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        >>> report = lrk.adapt(model, rank=2)
        >>> lrk.adapter_layers(model)["0"].adapters["default"].depth
        3
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def unadapt(model: nn.Module) -> None:
    """Put the original modules back, the very objects, with every parameter's ``requires_grad`` as before :func:`adapt`.

    Merged adapters are unmerged first, so the weights are bit for bit what they were; the adapters are lost. Modules that
    were trained in full keep what they learned.

    Raises:
        ValueError: the model holds no adapters.
    """
    layers = _changeable("unadapt", model).values()
    for layer in layers:
        if layer.merged:
            layer.unmerge()
    _put_back(model, layers)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add the active adapters to the weights and put the original modules back; returns the model itself.

    The sum is float32 (float64 for float64), rounded once to the dtype of the weight. What that loses,
    ``merge()`` of every layer in :func:`adapter_layers` reports before.

    Raises:
        ValueError: the model holds no adapters, a merged weight would not be finite, or weights are sharded (``fully_shard``);
            the model is as it was then.

    Note:
        Until all layers are merged, a copy of their weights is kept to go back to.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        >>> report = lrk.adapt(model, rank=2)
        >>> lrk.merge_and_unload(model)
        Sequential(
          (0): Linear(in_features=16, out_features=32, bias=True)
          (1): ReLU()
        )
    """
    layers = _changeable("merge_and_unload", model)
    sharding_team(model)  # puts sharded weights back where they are, so that merge() refuses them
    before = {name: layer.merged_adapters for name, layer in layers.items()}
    name = ""
    try:
        for name, layer in layers.items():
            new = [adapter for adapter in layer.active_adapters if adapter not in before[name]]
            if new:
                layer.merge(new)
    except BaseException as error:  # out of memory too: every layer keeps a copy of its weight
        for other, layer in layers.items():
            if layer.merged_adapters != before[other]:
                layer.unmerge()
                if before[other]:
                    layer.merge(before[other])
        if isinstance(error, ValueError):
            raise ValueError(f"merge_and_unload: {name}: {error}") from error
        raise
    _put_back(model, layers.values())
    return model


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones in every layer that has them; only they require gradients.

    Active adapters of a layer add up; a layer that has none of them computes what its base layer does.

    Raises:
        ValueError: no layer has an adapter of that name, or adapters are merged; nothing is changed.
    """
    layers = _changeable("set_adapter", model)
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) != len(names):
        raise ValueError(f"set_adapter: names must differ, got {', '.join(names)}")
    for name in names:
        _with_adapter("set_adapter", layers, name)
    for layer in layers.values():
        layer.set_adapter([name for name in names if name in layer.adapters])


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter from every layer; a layer left without any is replaced by the original module.

    Raises:
        ValueError: no layer has an adapter of that name, or adapters are merged; nothing is changed.
    """
    layers = _with_adapter("delete_adapter", _changeable("delete_adapter", model), name)
    for layer in layers.values():
        layer.delete_adapter(name)
    _put_back(model, [layer for layer in layers.values() if not layer.adapters])


def _with_adapter(function: str, layers: dict[str, AdapterLayer], name: str) -> dict[str, AdapterLayer]:
    """The layers that have the adapter: at least one, and nothing merged."""
    found = {key: layer for key, layer in layers.items() if name in layer.adapters}
    if not found:
        known = ", ".join(repr(key) for key in dict.fromkeys(key for layer in layers.values() for key in layer.adapters))
        raise ValueError(f"{function}: no layer has an adapter {name!r}; there are: {known}")
    merged = [key for key, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{function}: adapters are merged in {len(merged)} layers, such as {merged[0]}; unmerge() them first")
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before :func:`adapt`.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(16, 32)), torch.ones(1, 16)
        >>> before, report = model(x), lrk.adapt(model, rank=2, mode="paper", init_scale=1.0)
        >>> with lrk.disabled(model):
        ...     same = torch.equal(model(x), before)
        >>> same, torch.equal(model(x), before)
        (True, False)
    """
    with ExitStack() as stack:
        for layer in _adapted("disabled", model).values():
            stack.enter_context(layer.disabled())
        yield
