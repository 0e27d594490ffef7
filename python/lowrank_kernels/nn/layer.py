"""The frozen layer with named adapters: what all hosts and methods share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.three_factor import FACTOR_TYPES
from ..processes import assign, is_sharded
from ..reference.core import core_product


class Factors(NamedTuple):
    """``scale * left @ (core[L-1] @ ... @ core[0] - shift * I) @ right`` of one adapter: live tensors, differentiable."""

    left: Tensor  # (out, k)
    core: Tensor | None  # (L, k, k)
    right: Tensor  # (k, in)
    scale: float
    shift: float = 0.0


class MergeReport(NamedTuple):
    """What :meth:`AdapterLayer.merge` did to the base weight."""

    adapters: tuple[str, ...]  # merged by this call
    rounding_error: float  # largest |merged - base - delta|
    relative_error: float  # |merged - base - delta|_F / |delta|_F
    stash_bytes: int  # memory that keeps the base weight for unmerge()


@dataclass(frozen=True)
class AdapterInfo:
    """The settings of one adapter; ``dataclasses.asdict`` gives JSON, ``options`` what adds the same adapter again."""

    method: str  # "deeplora", "lora" or "randlora"
    rank: int
    scale: float  # s of the formulas
    dropout: float
    depth: int = 0  # number of cores
    init_scale: float | None = None
    alpha: float | None = None
    basis_seed: int | None = None
    mode: str = "paper"  # of Deep LoRA: how it starts, see MODES

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``add_adapter`` (but name, dtype and generator)."""
        names = {"deeplora": ("rank", "depth", "mode", "init_scale", "scale", "dropout"), "lora": ("rank", "alpha", "dropout")}
        return {name: getattr(self, name) for name in names.get(self.method, ("rank", "alpha", "dropout", "basis_seed"))}

    @property
    def shift(self) -> float:
        """What is subtracted from the diagonal of the product of the cores: its start, where the update starts at zero."""
        return 0.0 if self.mode == "paper" or self.init_scale is None else self.init_scale**self.depth


# ---------------------------------------------------------------------- the layer


class AdapterLayer(nn.Module):
    """A frozen layer and its named adapters; what all classes of this module share.

    Attributes:
        base_layer: the adapted module itself; its parameters are frozen.
        left, core, right: ``nn.ParameterDict`` by adapter name (empty for RandLoRA; core is empty for LoRA).
        adapters: name -> :class:`AdapterInfo`.
        matrix_shape: ``(out, in)`` of the update as a matrix.

    Note:
        Dropout acts in training only, and on the input of the update only. The first adapter is active, later ones once
        :meth:`set_adapter` names them; active ones add up. ``state_dict`` has the keys ``base_layer.*``, ``left.<name>``,
        ``core.<name>``, ``right.<name>`` (RandLoRA: ``lambdas.<name>``, ``gammas.<name>``), and the unmerged base weight
        also while adapters are merged.
    """

    method: str
    base_layer: nn.Module
    left: nn.ParameterDict
    core: nn.ParameterDict
    right: nn.ParameterDict
    adapters: dict[str, AdapterInfo]
    matrix_shape: tuple[int, int]
    _base_class: type[nn.Module]
    _kinds: Mapping[str, str] = {"left": "left", "core": "core", "right": "right"}  # kind -> attribute of its parameters
    _factor_names = ("left", "core", "right")  # of these three: torch.compile before 2.7 cannot read a dict of a class
    _mirrored: tuple[str, ...] = ()  # attributes of the base layer that models read

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._factor_names = (cls._kinds["left"], cls._kinds["core"], cls._kinds["right"])

    def __init__(self, base_layer: nn.Module, *args: Any, adapter: str = "default", **options: Any) -> None:
        reason = self._refusal(base_layer)
        if reason is not None:
            raise TypeError(f"{type(self).__name__}: base_layer {reason}")
        super().__init__()
        self.base_layer = base_layer
        for attribute in self._kinds.values():
            setattr(self, attribute, nn.ParameterDict())
        self.matrix_shape = self._matrix_shape(base_layer)
        self.adapters = {}
        self._enabled = True
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self._paused: tuple[str, ...] = ()  # was merged before the layer was disabled, and will be again
        self._running: tuple[str, ...] = ()  # what forward runs
        self._stash: Tensor | None = None  # the base weight while adapters are merged into it
        for name in self._mirrored:
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))
        self._register_state_dict_hook(_save_unmerged)
        self.train(base_layer.training)
        self.add_adapter(adapter, *args, **options)
        base_layer.requires_grad_(False)

    # What a host says.

    @classmethod
    def _hosts(cls, module: nn.Module) -> bool:
        """Whether this class is the one for such a module, or for those its class derives from."""
        return isinstance(module, cls._base_class)

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        """Why this module cannot be adapted, or None."""
        if type(module) is not cls._base_class:
            kind = "a subclass, which may use its weight in another way" if cls._hosts(module) else "another layer"
            return f"must be an nn.{cls._base_class.__name__} itself, got {type(module).__name__} ({kind})"
        return _weight_refusal(module)

    @staticmethod
    def _matrix_shape(base_layer: Any) -> tuple[int, int]:
        raise NotImplementedError

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """``(out, in)`` in the layout of the base weight."""
        raise NotImplementedError

    def _run(self, x: Tensor, running: tuple[str, ...], /) -> Tensor:
        """The base layer with the updates of these adapters."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self._running)

    # What a method says.

    def add_adapter(self, name: str, *args: Any, **options: Any) -> None:
        """Add a named adapter with the options of the constructor; :meth:`set_adapter` makes it active."""
        raise NotImplementedError

    def reset_parameters(self, name: str, generator: torch.Generator | None = None) -> None:
        """Start the adapter anew; random numbers come from a CPU generator (torch's own by default)."""
        raise NotImplementedError

    def factors(self, name: str) -> Factors:
        """The factors of an adapter as the forward pass uses them: the parameters themselves, differentiable."""
        info, modules = self._info(name), self._modules
        left_name, core_name, right_name = self._factor_names
        # Straight from the dicts: attributes of modules cost 6 us here, a tenth of a small layer's forward pass.
        left, right = modules[left_name]._parameters.get(name), modules[right_name]._parameters.get(name)  # type: ignore[union-attr]
        core = modules[core_name]._parameters.get(name)  # type: ignore[union-attr]
        if left is None:  # a replica of nn.DataParallel: its tensors are plain attributes
            left, core, right = (vars(modules[kind]).get(name) for kind in (left_name, core_name, right_name))
        return Factors(left, core, right, info.scale, info.shift)  # type: ignore[arg-type]

    @classmethod
    def from_module(cls, module: nn.Module, *args: Any, **options: Any) -> Any:
        """Wrap ``module``; the same as calling the class, and as ``from_linear``, ``from_embedding`` and ``from_conv``.

        Raises:
            TypeError: a module of another class, quantized, parametrized or of an unsupported kind; the message says why.
            ValueError: an option out of range, such as a rank above ``min(matrix_shape)``.
        """
        return cls(module, *args, **options)

    # ------------------------------------------------------------------ adapters by name

    @property
    def active_adapters(self) -> tuple[str, ...]:
        return self._active

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        return self._merged

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, which some models look at; without what is not merged."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trained parameters of one adapter by kind: left, core, right, or lambdas and gammas."""
        self._info(name)
        dicts = {kind: getattr(self, attribute) for kind, attribute in self._kinds.items()}
        return {kind: parameters[name] for kind, parameters in dicts.items() if name in parameters}

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make these adapters the active ones, in this order; only they require gradients."""
        names = self._names("set_adapter", names)
        self._refuse_merged("set_adapter")
        self._active = names
        for name in self.adapters:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(name in names)
        self._refresh()

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter and its parameters; was it the only active one, then none is active."""
        self._info(name)
        self._refuse_merged("delete_adapter")
        for kind in self.adapter_parameters(name):
            del getattr(self, self._kinds[kind])[name]
        del self.adapters[name]
        self._active = tuple(other for other in self._active if other != name)
        self._refresh()

    def set_factors(self, name: str, left: Tensor, core: Tensor | None, right: Tensor) -> None:
        """Copy values of any dtype into the parameters of an adapter.

        Args:
            name: the adapter.
            left: ``(out, k)``.
            core: ``(depth, k, k)``; None for LoRA.
            right: ``(k, in)``.
        """
        parameters = self.adapter_parameters(name)
        given = {kind: value for kind, value in (("left", left), ("core", core), ("right", right)) if value is not None}
        if given.keys() != parameters.keys():
            raise ValueError(
                f"set_factors: adapter {name!r} ({self.method}) has {', '.join(parameters)}, got {', '.join(given)}"
            )
        for kind, value in given.items():
            if value.shape != parameters[kind].shape:
                raise ValueError(f"set_factors: {kind} must be {tuple(parameters[kind].shape)}, got {tuple(value.shape)}")
        for kind, value in given.items():
            assign(parameters[kind], value)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the layer is its base layer; merged adapters are unmerged at the start and merged again at the end."""
        before = self._enabled
        self._enable(False)
        try:
            yield
        finally:
            self._enable(before)

    def _enable(self, enabled: bool) -> None:
        if not enabled and self._merged:
            self._paused = self._merged
            self.unmerge()
        self._enabled = enabled
        self._refresh()
        if enabled:
            paused, self._paused = tuple(name for name in self._paused if name in self.adapters), ()
            if paused:
                self.merge(paused)

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, name: str) -> Tensor:
        """The update of the base weight, in its layout; float32 (float64 for float64), differentiable in the factors."""
        left, core, right, scale, shift = self.factors(name)
        dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
        device_type = left.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)  # none on meta
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            product = core_product(None if core is None else core.to(dtype), shift)
            right = right.to(dtype) if product is None else product @ right.to(dtype)
            return self._as_weight(scale * (left.to(dtype) @ right))

    @torch.no_grad()
    def merge(self, names: str | Sequence[str] | None = None) -> MergeReport:
        """Add adapters (the active ones by default) to the base weight; :meth:`unmerge` restores it bit for bit.

        The sum is float32 (float64 for float64) and rounded once to the dtype of the base weight, whose original is kept.
        What is merged already is skipped with a warning.

        Raises:
            ValueError: an update or the merged weight is not finite, the weight is sharded, or the adapters are disabled;
                nothing was changed.
        """
        if not self._enabled:
            raise ValueError("merge: the adapters are disabled, and the layer computes what its base does; enable them first")
        wanted = self._active if names is None else self._names("merge", names)
        new = tuple(name for name in wanted if name not in self._merged)
        weight = self.weight
        if not new:
            reason = f"{', '.join(wanted)} already merged" if wanted else "no adapter is active"
            warnings.warn(f"merge: nothing to do, {reason}", stacklevel=3)
            return MergeReport((), 0.0, 0.0, 0 if self._stash is None else self._stash.nbytes)
        if weight.is_meta:
            raise ValueError("merge: the base weight is on the meta device and has no values; load the model first")
        if is_sharded(weight):
            raise ValueError(
                "merge: the base weight is sharded; save_adapter(), load it into a model of one process, merge there"
            )
        original = weight.detach() if self._stash is None else self._stash.to(weight.device)
        delta = None
        for name in (*self._merged, *new):
            update = self.get_delta_weight(name)
            if not bool(torch.isfinite(update).all()):
                raise ValueError(f"merge: the update of adapter {name!r} has NaN or infinity; nothing was changed")
            delta = update if delta is None else delta + update
        assert delta is not None
        wide = original.to(delta.dtype)
        merged = (wide + delta).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"merge: base weight + update is not finite in {weight.dtype}; nothing was changed")
        error = merged.to(delta.dtype) - wide - delta
        norm = float(torch.linalg.vector_norm(delta))
        self._stash = original.clone() if self._stash is None else self._stash
        weight.copy_(merged)
        self._merged += new
        self._refresh()
        relative = float(torch.linalg.vector_norm(error)) / norm if norm else 0.0
        return MergeReport(new, float(error.abs().max()), relative, self._stash.nbytes)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out again: the base weight is bit for bit what it was before the first merge."""
        if self._stash is None:
            warnings.warn("unmerge: nothing to do, no adapter is merged", stacklevel=3)
            return
        self.weight.copy_(self._stash)
        self._stash, self._merged = None, ()
        self._refresh()

    # ------------------------------------------------------------------ inside

    def _refresh(self) -> None:
        """Decide what forward runs: here, where it changes, not on every call."""
        self._running = tuple(name for name in self._active if name not in self._merged) if self._enabled else ()

    def _info(self, name: str) -> AdapterInfo:
        try:
            return self.adapters[name]
        except KeyError:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"{type(self).__name__}: no adapter {name!r}; there are: {known}") from None

    def _names(self, function: str, names: str | Sequence[str]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self._info(name)
        if len(set(names)) != len(names):
            raise ValueError(f"{function}: names must differ, got {', '.join(names)}")
        return names

    def _refuse_merged(self, function: str) -> None:
        if self._merged:
            raise ValueError(f"{function}: {', '.join(self._merged)} merged into the base weight; call unmerge() first")

    def _dropout(self, name: str) -> float:
        return self.adapters[name].dropout if self.training else 0.0

    def _add(
        self,
        name: str,
        info: AdapterInfo,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        """Check everything, then make the parameters ``shapes[kind]`` of a new adapter."""
        self._refuse_merged("add_adapter")
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"add_adapter: a name must be a non-empty string without dots, got {name!r}")
        if name in self.adapters:
            raise ValueError(f"add_adapter: there is an adapter {name!r} already; delete_adapter() it first")
        if hasattr(getattr(self, self._kinds["left"]), name):
            raise ValueError(f"add_adapter: {name!r} is the name of a method of nn.ParameterDict; choose another")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"add_adapter: generator must be a CPU torch.Generator, got one on {generator.device}")
        if not 0 <= info.dropout < 1:
            raise ValueError(f"add_adapter: dropout must be from 0 to below 1, got {info.dropout}")
        if not math.isfinite(info.scale):
            raise ValueError(f"add_adapter: the scale must be finite, got {info.scale}")
        weight = self.weight
        allowed = FACTOR_TYPES[weight.dtype]
        if dtype not in (None, *allowed):
            words = " or ".join(map(str, allowed))
            raise TypeError(f"add_adapter: dtype must be {words} for a base weight of {weight.dtype}, got {dtype}")
        for kind, shape in shapes.items():
            getattr(self, self._kinds[kind])[name] = nn.Parameter(
                torch.empty(shape, dtype=dtype or allowed[-1], device=weight.device), requires_grad=not self.adapters
            )
        self._active = (*self._active, name) if not self.adapters else self._active
        self.adapters[name] = info
        self.reset_parameters(name, generator)
        self._refresh()

    def _check_rank(self, rank: int) -> None:
        smaller = min(self.matrix_shape)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= smaller:
            out_features, in_features = self.matrix_shape
            raise ValueError(
                f"{type(self).__name__}: rank must be an integer from 1 to {smaller}, the smaller side of this layer's "
                f"{out_features} x {in_features} matrix, got {rank!r}"
            )

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        self._refuse_merged("load_state_dict")
        super()._load_from_state_dict(*args, **keywords)

    def extra_repr(self) -> str:
        lines = []
        for name, info in self.adapters.items():
            state = "merged" if name in self._merged else "active" if name in self._active else "inactive"
            depth = f", depth {info.depth}" if info.depth else ""
            drop = f", dropout {info.dropout:g}" if info.dropout else ""
            mode = f" ({info.mode})" if info.method == "deeplora" else ""
            lines.append(f"{name}: {info.method}{mode}, rank {info.rank}{depth}, scale {info.scale:g}{drop}, {state}")
        return "\n".join([*lines, *([] if self._enabled else ["disabled"])])


def _save_unmerged(layer: AdapterLayer, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A checkpoint holds the base weight and the adapters, never an adapter twice."""
    if layer._stash is not None:
        state[f"{prefix}base_layer.weight"] = layer._stash


def _weight_refusal(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "computes its weight (weight_norm, spectral_norm, pruning or another parametrization); remove that first"
    if type(weight) is not nn.Parameter:
        return f"has a weight of {type(weight).__name__}, quantized or sharded; only plain parameters can be adapted"
    if weight.dtype not in FACTOR_TYPES:
        return f"has a weight of {weight.dtype}; it must be float32, float64, bfloat16 or float16"
    return None
