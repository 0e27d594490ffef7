"""Deep LoRA as a method of PEFT: importing this module registers ``DEEPLORA``.

    import lowrank_kernels.integrations.peft as lrk_peft
    model = peft.get_peft_model(base, lrk_peft.DeepLoraConfig(r=8, target_modules="all-linear"))

A tuner layer *is* one of :mod:`lowrank_kernels.nn`, with PEFT's interface beside its own: what works on those layers
(:func:`~lowrank_kernels.compress_`, :func:`~lowrank_kernels.parameter_groups`, :func:`~lowrank_kernels.rank_report`, the fused
op, merging that can be undone bit for bit) works on a ``PeftModel``. Where the two interfaces use one name, PEFT's calls and
this package's are both understood.

- The start is drawn from torch's global generator, as PEFT's methods do: ``torch.manual_seed`` governs it.
- Factors are float32 on half-precision layers, whatever the route; ``autocast_adapter_dtype=False`` makes them the layer's.
- Every merge is PEFT's safe merge: an update that is not finite is refused.
- Only plain layers: quantized ones, subclasses and ``nn.MultiheadAttention`` are refused with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import adapter_files
from ..adapters import adapter_layers
from ..files import PathLike, extra, write_atomically
from ..nn import (
    AdapterLayer,
    DeepLoRAConv1d,
    DeepLoRAConv2d,
    DeepLoRAEmbedding,
    DeepLoRALinear,
    MergeReport,
    layer_class,
)
from ..nn.methods import MODES, start_scale
from ..ops.three_factor import FACTOR_TYPES
from .peft_fused import AccelerationReport, accelerate_peft, decelerate_peft

extra("peft", "lowrank_kernels.integrations.peft")

from peft import LoraConfig, PeftConfig, PeftModel, PeftType  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.utils import (  # noqa: E402
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_peft_model_state_dict,
    register_peft_method,
)
from peft.utils.other import get_pattern_key  # noqa: E402

__all__ = [
    "AccelerationReport",
    "DeepLoraConfig",
    "DeepLoraLayer",
    "DeepLoraModel",
    "accelerate_peft",
    "decelerate_peft",
    "save_pretrained",
]

BASE = "__base__"  # PEFT's name for no adapter in a mixed batch
_HEADING = "## Loading this adapter"
_HOW_TO_LOAD = f"""
{_HEADING}

The method, Deep LoRA (`DEEPLORA`), comes from `lowrank-kernels` (`pip install lowrank-kernels[hf]`). Import it first:

```python
import lowrank_kernels.integrations.peft  # registers DEEPLORA; without it PEFT raises KeyError: 'DEEPLORA'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

If there is a folder `lora` beside this file, it holds the same adapter as a plain LoRA, which needs PEFT alone.
"""


# ---------------------------------------------------------------------- config


@dataclass
class DeepLoraConfig(PeftConfig):
    r"""Deep LoRA, :math:`W \to W + scale \cdot left\; (core_{depth-1} \cdots core_0 - \tau I)\; right`, in PEFT's field names.

    Args:
        r: inner width of every adapter, at most the smaller side of its layer; even for the paper's ``compress_``.
        target_modules: names or ends of names, a regular expression over whole names, or "all-linear"; by default what PEFT
            takes for LoRA in that architecture. Linear layers, transformers' Conv1D, embeddings, Conv1d and Conv2d.
        exclude_modules: the same, of modules to leave alone.
        depth: number of cores, at least 1.
        scale: s of the update. There is no ``alpha / r``: the rate of the cores goes down with the rank instead
            (:func:`~lowrank_kernels.parameter_groups`), and a fixed s keeps updates of different ranks comparable.
        deeplora_dropout: probability, from 0 to below 1, to drop an element of the adapter's input, in training only.
        mode: "aligned": the update starts at zero, tau = ``epsilon^depth``; "paper": tau = 0, it starts with r singular values
            ``scale * epsilon^depth``, not zero but far below the rounding of the layer. See
            :class:`~lowrank_kernels.nn.DeepLoRALinear`.
        init_scale: epsilon; cores start as epsilon I between random orthonormal frames. None: by mode and depth, and written
            into the config.
        init_weights: False starts with random cores of order 1 instead, an update that shows; for tests.
        rank_pattern: rank of the layers whose name, or end of name, matches the regular expression; the first match counts.
        bias: "none"; "all" or "deeplora_only" also train biases, of all or of the adapted layers.
        modules_to_save: modules that are trained and saved in full beside the adapters, such as a new head.
        layers_to_transform: indexes of the layers to adapt, where target_modules is a list.
        layers_pattern: name of the module list these indexes count in.
        requires_import: written to ``adapter_config.json`` for those who load it; not an option.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import peft, torch
        >>> from lowrank_kernels.integrations.peft import DeepLoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> model = peft.get_peft_model(base, DeepLoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 44 || all params: 152 || trainable%: 28.9474

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    depth: int = 3
    scale: float = 1.0
    deeplora_dropout: float = 0.0
    mode: str = "aligned"
    init_scale: float | None = None
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    requires_import: str = __name__

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["DEEPLORA"]
        self.requires_import = __name__
        self.rank_pattern = self.rank_pattern or {}
        counts = {"r": self.r, "depth": self.depth, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"DeepLoraConfig: {name} must be an integer of at least 1, got {value!r}")
        if self.mode not in MODES:
            raise ValueError(f"DeepLoraConfig: mode must be 'aligned' or 'paper', got {self.mode!r}")
        if self.init_scale is None:
            self.init_scale = start_scale(self.mode, self.depth)
        for name in ("scale", "init_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"DeepLoraConfig: {name} must be finite, got {getattr(self, name)}")
        if not 0 <= self.deeplora_dropout < 1:
            raise ValueError(f"DeepLoraConfig: deeplora_dropout must be from 0 to below 1, got {self.deeplora_dropout}")
        if self.bias not in ("none", "all", "deeplora_only"):
            raise ValueError(f"DeepLoraConfig: bias must be 'none', 'all' or 'deeplora_only', got {self.bias!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("DeepLoraConfig: layers_pattern needs layers_to_transform, the indexes to adapt; got None")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                "DeepLoraConfig: layers_to_transform and layers_pattern need target_modules as a list of names, "
                f"got {self.target_modules!r}; say the layers in that expression"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's ``adapter_config.json``, and in the ``README.md`` beside it what to import before loading."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if _HEADING not in text:
            card.write_text(text.rstrip() + "\n" + _HOW_TO_LOAD, encoding="utf-8")


# ---------------------------------------------------------------------- layers


class DeepLoraLayer(AdapterLayer, BaseTunerLayer):  # type: ignore[misc]
    """An adapter layer of this package that is one of PEFT's too; the classes below name the layer it stands for.

    ``active_adapters`` are those this layer has; ``active_adapter``, PEFT's word for what the model was told, may name more.
    """

    adapter_layer_names = ("deeplora_left", "deeplora_core", "deeplora_right")
    other_param_names = ("adapters",)
    cast_input_dtype_enabled = True  # PEFT's switch; the op never casts its input up, so there is nothing to switch
    _kinds: Mapping[str, str] = {kind: f"deeplora_{kind}" for kind in ("left", "core", "right")}
    deeplora_left: nn.ParameterDict
    deeplora_core: nn.ParameterDict
    deeplora_right: nn.ParameterDict
    _active_adapter: str | list[str]

    def __init__(self, base_layer: nn.Module, *args: Any, adapter: str = "default", **options: Any) -> None:
        self._active_adapter = [adapter]
        super().__init__(base_layer, *args, adapter=adapter, **options)
        out_features, in_features = self.matrix_shape
        self.in_features = getattr(self, "in_channels", in_features)
        self.out_features = getattr(self, "out_channels", out_features)

    def update_layer(self, adapter_name: str, r: int, config: DeepLoraConfig) -> None:
        """Add an adapter as a config says; what was active stays so."""
        self.add_adapter(adapter_name, r, **_options(config))
        self._start(adapter_name, config)

    def _start(self, adapter_name: str, config: DeepLoraConfig) -> None:
        core = self.adapter_parameters(adapter_name)["core"]
        if not config.init_weights and not core.is_meta:
            with torch.no_grad():
                core.copy_(torch.randn(core.shape, device="cpu") / math.sqrt(core.shape[-1]))
        self.set_adapter(self._active_adapter, inference_mode=config.inference_mode)

    # The dictionaries under the names they have in lowrank_kernels.nn.

    @property
    def left(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.deeplora_left

    @property
    def core(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.deeplora_core

    @property
    def right(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.deeplora_right

    # One name, two interfaces.

    @property
    def active_adapters(self) -> list[str]:  # type: ignore[override]
        return list(self._active)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return list(self._merged)

    @property
    def disable_adapters(self) -> bool:
        return not self._enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, those that this layer has; only they require gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_adapter([name for name in names if name in self.adapters])
        self._active_adapter = names
        if inference_mode or not self._enabled:
            self._require_gradients(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer; merged ones are taken out meanwhile, and merged again afterwards."""
        self._enable(enabled)
        self._require_gradients(enabled)

    def _require_gradients(self, wanted: bool) -> None:
        for name in self._active:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(wanted)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter where this layer has it; was no other active, the first one left is."""
        if adapter_name in self.adapters:
            super().delete_adapter(adapter_name)
        names = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        if adapter_name in names:
            self.set_adapter([name for name in names if name != adapter_name] or sorted(self.adapters)[:1])

    def merge(  # type: ignore[override]
        self,
        names: str | Sequence[str] | bool | None = None,
        adapter_names: Sequence[str] | None = None,
        *,
        safe_merge: bool = False,
    ) -> MergeReport:
        """As :meth:`AdapterLayer.merge`, and as PEFT's ``merge(safe_merge, adapter_names)``: names of others are skipped."""
        names = adapter_names if names is None or isinstance(names, bool) else names
        if names is None:
            names = self._active
        names = [name for name in ([names] if isinstance(names, str) else names) if name in self.adapters]
        if not names:
            return MergeReport((), 0.0, 0.0, 0 if self._stash is None else self._stash.nbytes)
        return super().merge(names)

    def _refuse_merged(self, function: str) -> None:
        """PEFT's way: what changes the adapters takes the merged ones out first."""
        if self._merged:
            warnings.warn(f"{function}: unmerging {', '.join(self._merged)} first; merge again afterwards", stacklevel=4)
            self.unmerge()
        self._paused = ()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return isinstance(self, DeepLoRALinear)

    # Dtypes: PEFT would round the factors to the dtype of the layer and cast them up again.

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.adapters:
            self._cast(adapter_name, device=self.weight.device if device is None else device)

    def _cast(self, adapter_name: str, **target: Any) -> None:
        for parameter in self.adapter_parameters(adapter_name).values():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(**target)

    # Forward.

    def forward(self, x: Tensor, *, adapter_names: Sequence[str] | None = None) -> Tensor:
        """``adapter_names``: an adapter for every row of a mixed batch, "__base__" for none."""
        if adapter_names is None or not self._enabled:
            return self._run(x, self._running)
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must name an adapter for each of the {len(x)} inputs, got {len(adapter_names)} names"
            )
        if self._merged:
            raise ValueError(
                f"adapter_names cannot be used while {', '.join(self._merged)} is merged; call unmerge_adapter() first"
            )
        rows: dict[tuple[str, ...], list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault((name,) if name in self.adapters else (), []).append(row)
        if len(rows) < 2:
            return self._run(x, *rows or [()])
        parts = [self._run(x[chosen], running) for running, chosen in rows.items()]
        order = torch.tensor([row for chosen in rows.values() for row in chosen], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]

    def __repr__(self) -> str:
        return f"deeplora.{super().__repr__()}"


class Linear(DeepLoraLayer, DeepLoRALinear):  # type: ignore[misc]
    """``nn.Linear`` or transformers' ``Conv1D`` with Deep LoRA adapters, in PEFT."""


class Embedding(DeepLoraLayer, DeepLoRAEmbedding):  # type: ignore[misc]
    """``nn.Embedding`` with Deep LoRA adapters, in PEFT."""


class Conv1d(DeepLoraLayer, DeepLoRAConv1d):  # type: ignore[misc]
    """``nn.Conv1d`` with Deep LoRA adapters, in PEFT."""


class Conv2d(DeepLoraLayer, DeepLoRAConv2d):  # type: ignore[misc]
    """``nn.Conv2d`` with Deep LoRA adapters, in PEFT."""


_CLASSES: dict[type[AdapterLayer], type[DeepLoraLayer]] = {
    DeepLoRALinear: Linear,
    DeepLoRAEmbedding: Embedding,
    DeepLoRAConv1d: Conv1d,
    DeepLoRAConv2d: Conv2d,
}


def _options(config: DeepLoraConfig) -> dict[str, Any]:
    return {
        "depth": config.depth,
        "mode": config.mode,
        "init_scale": config.init_scale,
        "scale": config.scale,
        "dropout": config.deeplora_dropout,
    }


# ---------------------------------------------------------------------- tuner


class DeepLoraModel(BaseTuner):
    """What ``get_peft_model`` puts around a model for a :class:`DeepLoraConfig`; its methods are PEFT's."""

    prefix = "deeplora_"
    tuner_layer_cls = DeepLoraLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: DeepLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = peft_config.rank_pattern
        rank = pattern.get(get_pattern_key(list(pattern), current_key), peft_config.r)
        try:
            if isinstance(target, DeepLoraLayer):
                target.update_layer(adapter_name, rank, peft_config)
                return
            layer = _CLASSES[layer_class(target)](target, rank, adapter=adapter_name, **_options(peft_config))
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix("layer_class: ")
            raise ValueError(
                f"DEEPLORA cannot adapt {current_key!r}: {reason}; choose others by target_modules, or leave it out by "
                "exclude_modules"
            ) from error
        layer._start(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """PEFT's, all or nothing: after an error the model is as it was."""
        before = {id(layer) for layer in adapter_layers(model).values() if adapter_name in layer.adapters}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **options)
        except BaseException:
            for name, layer in adapter_layers(model).items():
                if adapter_name not in layer.adapters or id(layer) in before:
                    continue
                layer.delete_adapter(adapter_name)
                if not layer.adapters:
                    parent, _, key = name.rpartition(".")
                    setattr(model.get_submodule(parent), key, layer.base_layer)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, with one choice for all layers of what is active then."""
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if adapter_name not in before:
            self.active_adapter = before
            return
        active = [name for name in before if name != adapter_name] or sorted(self.peft_config)[:1]
        self.active_adapter = active
        if active:
            self.set_adapter(active)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.modules():
            if isinstance(layer, DeepLoraLayer) and adapter_name in layer.adapters:
                dtype = layer.weight.dtype
                layer._cast(adapter_name, dtype=FACTOR_TYPES[dtype][-1] if autocast_adapter_dtype else dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, every layer is told the adapter of each row of a mixed batch."""
        names = kwargs.get("adapter_names")
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets belongs to aLoRA, a variant of LORA; DEEPLORA has none: leave it out")
        if names is None:
            yield
            return
        names = self._checked_names(names)
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else names
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        before_beams = set() if encoder in (None, self.model) else set(map(id, encoder.modules()))  # it sees each input once
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, DeepLoraLayer | AuxiliaryTrainingWrapper):
                    tell = partial(_tell, names if id(module) in before_beams else repeated)
                    stack.callback(module.register_forward_pre_hook(tell, with_kwargs=True).remove)
            yield

    def _checked_names(self, names: Any) -> list[str]:
        if self.training:
            raise ValueError("adapter_names is for inference: the model is in training mode; call eval() first")
        if not isinstance(names, list | tuple):
            raise TypeError(f"adapter_names must be a list with a name for every input, got {type(names).__name__}")
        known = {BASE, *(name for layer in self.modules() if isinstance(layer, DeepLoraLayer) for name in layer.adapters)}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"adapter_names has non-existing adapter(s) {', '.join(unknown)}; there are {sorted(known)}")
        return list(names)


def _tell(names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


# ---------------------------------------------------------------------- the plain-LoRA twin


def save_pretrained(
    model: PeftModel,
    folder: PathLike,
    *,
    lora_twin: bool = True,
    shrink: float | None = None,
    **options: Any,
) -> None:
    r"""``model.save_pretrained``, and beside each adapter its plain-LoRA twin in the folder ``lora``, for PEFT alone.

    .. math:: A = (core_{depth-1} \cdots core_0 - \tau I)\; right, \qquad B = scale \cdot left, \qquad B A = \Delta W

    Args:
        model: a ``PeftModel`` of :class:`DeepLoraConfig`.
        folder: for PEFT's files; an adapter of another name than "default" gets a folder inside, as PEFT does.
        lora_twin: False writes what ``model.save_pretrained`` writes.
        shrink: cut the twin to its numerical rank, the tolerance of :func:`~lowrank_kernels.shrink_factors`; None: exact.
        options: of ``model.save_pretrained``.

    Raises:
        ValueError: a layer that PEFT's LoRA computes otherwise (dilated or non-zero padded convolutions), factors that are
            not finite, ``state_dict`` with a twin.

    Note:
        The twin of rank r has the modules trained in full, biases and saved embeddings too. Files there are replaced.

    Example:
        >>> import peft, tempfile, torch
        >>> from lowrank_kernels.integrations.peft import DeepLoraConfig, save_pretrained
        >>> bases = [torch.nn.Sequential(torch.nn.Linear(6, 4)) for _ in range(2)]
        >>> _ = bases[1].load_state_dict(bases[0].state_dict())
        >>> model = peft.get_peft_model(bases[0], DeepLoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     twin = peft.PeftModel.from_pretrained(bases[1], f"{folder}/lora")
        >>> x = torch.ones(1, 6)
        >>> twin.peft_type.value, torch.allclose(twin(x), model(x), atol=1e-6)
        ('LORA', True)
    """
    if lora_twin and options.get("state_dict") is not None:
        raise ValueError("save_pretrained: a twin is made from the model's own factors, got state_dict; use lora_twin=False")
    model.save_pretrained(str(folder), **options)
    if lora_twin and options.get("is_main_process", True):
        for adapter in options.get("selected_adapters") or list(model.peft_config):
            inside = Path(folder) if adapter == "default" else Path(folder, adapter)
            _save_twin(model, adapter, inside / "lora", shrink, options.get("save_embedding_layers", "auto"))


def _save_twin(model: PeftModel, adapter: str, folder: Path, shrink: float | None, embeddings: Any) -> None:
    base, config = model.get_base_model(), model.peft_config[adapter]
    assert isinstance(config, DeepLoraConfig)
    _, layers = adapter_files._chosen("save_pretrained", base, adapter)
    adapter_files._check_peft(base, layers)
    exported = adapter_files.export_lora(base, adapter=adapter, shrink=shrink)
    others = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embeddings)
    tensors = {key: value.detach().cpu().contiguous() for key, value in others.items() if ".deeplora_" not in key}
    tensors |= adapter_files._peft_tensors(base, layers, exported)
    settings = adapter_files._peft_config(base, layers, adapter, exported, config.base_model_name_or_path)
    for name in ("task_type", "revision", "modules_to_save"):
        settings[name] = getattr(config, name)
    settings["bias"] = "lora_only" if config.bias == "deeplora_only" else config.bias
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(**settings).save_pretrained(str(folder))
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    write_atomically(folder / "adapter_model.safetensors", lambda handle: handle.write(weights), True)


# ---------------------------------------------------------------------- registration


def _register() -> None:
    """PEFT's registry takes members of a closed enum only: add one, unless PEFT has it by now."""
    name = "DEEPLORA"
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_names_.append(name)
        getattr(PeftType, "_hashable_values_", []).append(name)  # what `in` looks at from Python 3.13
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    owner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[name])
    if owner is None:
        register_peft_method(name="deeplora", config_cls=DeepLoraConfig, model_cls=DeepLoraModel)
    elif owner.__module__ != __name__:
        raise ImportError(
            f"{__name__}: this PEFT has a method {name} already ({owner.__module__}); use that one, or a newer lowrank-kernels"
        )


_register()
