"""Adapters as files: a native one that keeps every bit, and the plain LoRA that others read.

:func:`save_adapter` writes the parameters as they are (left, core, right; RandLoRA's lambdas and gammas) into one
safetensors file whose metadata hold the settings as JSON. One file, so that weights and settings cannot part and one rename
replaces both. Nothing that is read is ever executed.

:func:`export_lora` writes the folder of PEFT. A trained update is a plain LoRA of the same rank:

    delta = scale * left @ (core[L-1] @ ... @ core[0] - shift I) @ right = b @ a,    a = (...) @ right,  b = scale * left

so that PEFT's factor ``lora_alpha / r`` is 1. Deep LoRA ends with few singular values (:func:`shrink_factors` finds them in
the k x k core): the shrunk LoRA is smaller, and differs by what it says.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapters import (
    adapter_layers,
    check_free,
    first_names,
    install,
    matrix_shape,
    refuse_peft,
    train_in_full,
    trained_modules,
    unsupported,
    within,
)
from .files import InputError, OutputError, PathLike, check_output, read_head, write_atomically
from .nn import AdapterInfo, AdapterLayer, Factors
from .ops.three_factor import FACTOR_TYPES
from .processes import assign, full, gathered, is_sharded, plain_class, sharding_team, unwrapped
from .reference.core import core_product

FORMAT_VERSION = 1
_PEFT_FILES = "use its save_pretrained() and load_adapter(), or save_pretrained() of lowrank_kernels.integrations.peft"
_KEY = "lowrank_kernels_adapter"  # the only entry of the metadata: their order is not kept, the same adapter is the same file


class LoRAFactors(NamedTuple):
    """A plain LoRA update ``b @ a``, on the CPU."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    error: float = 0.0  # |b a - delta|_2 / |delta|_2 of what was cut off, without the last rounding


class LoadReport(NamedTuple):
    """What :func:`load_adapter` did."""

    adapter: str
    layers: tuple[str, ...]
    added: bool  # False: the model had this adapter, and its values were replaced
    rounded: tuple[str, ...]  # layers whose dtype is another one in the file
    trained: tuple[str, ...]  # modules that were trained in full beside the adapter
    package_version: str  # that wrote the file


# ---------------------------------------------------------------------- plain LoRA


def shrink_factors(factors: Factors, tol: float = 1e-6) -> LoRAFactors:
    r"""The update as a LoRA of its numerical rank, through the small core.

    .. math:: L = Q_l R_l, \quad R^T = Q_r R_r, \quad s\,R_l C R_r^T = U \Sigma V^T, \qquad
        b = Q_l U \Sigma^{1/2}, \quad a = \Sigma^{1/2} V^T Q_r^T

    with the singular values above ``tol`` times the largest. Nothing of size out x in is formed.

    Args:
        factors: of one adapter, ``layer.factors(name)``.
        tol: from 0 to below 1.

    Returns:
        ``LoRAFactors(a (r, in), b (out, r), error)``; error, the first singular value left out over the largest one, is at
        most tol. A zero update keeps rank 1.

    Raises:
        ValueError: tol out of range, or factors that are not finite or on the meta device.

    Note:
        Computed in float64 on the CPU; a and b are float32, or float64 for float64 factors.

    Example:
        >>> import torch
        >>> from lowrank_kernels.adapter_files import shrink_factors
        >>> from lowrank_kernels.nn import Factors
        >>> core = torch.diag(torch.tensor([2.0, 1.0, 1e-9])).unsqueeze(0)
        >>> a, b, error = shrink_factors(Factors(torch.eye(5, 3), core, torch.eye(3, 4), scale=1.0))
        >>> a.shape, b.shape, f"{error:.0e}"
        (torch.Size([2, 4]), torch.Size([5, 2]), '5e-10')
    """
    if not 0 <= tol < 1:
        raise ValueError(f"shrink_factors: tol must be from 0 to below 1, got {tol}")
    dtype, left, right, product = _wide("shrink_factors", factors)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    inner = r_left @ (r_right.t() if product is None else product @ r_right.t())
    u, s, vh = torch.linalg.svd(factors.scale * inner, full_matrices=False)
    rank = max(1, int((s > tol * s[0]).sum()))
    error = float(s[rank] / s[0]) if rank < len(s) and s[0] > 0 else 0.0
    root = s[:rank].sqrt()
    a, b = root.unsqueeze(1) * (vh[:rank] @ q_right.t()), (q_left @ u[:, :rank]) * root
    return LoRAFactors(*_rounded("shrink_factors", a, b, dtype), error)


def export_lora(
    model: nn.Module,
    folder: PathLike | None = None,
    *,
    adapter: str | None = None,
    shrink: float | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> dict[str, LoRAFactors]:
    """An adapter as plain LoRA factors by layer, and as a folder that PEFT loads.

    Args:
        model: with adapters, of any method.
        folder: for ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's layout, made where missing;
            None writes nothing.
        adapter: which one; by default the only one, or the active one.
        shrink: tolerance of :func:`shrink_factors`; None keeps the rank and the exact factors.
        base_model_name_or_path: for PEFT's config; by default what ``model.config`` says.
        overwrite: replace the two files.

    Returns:
        name -> ``LoRAFactors(a (r, in), b (out, r), error)``, ``b @ a`` being the whole update, its scale included.

    Raises:
        ValueError: no such adapter, factors that are not finite, or (with a folder) a layer that PEFT computes otherwise:
            a dilated or non-zero padded convolution, a shared layer, the model itself being the layer, or one whose name ends
            like that of a module trained in full.
        OutputError: the files exist already or cannot be written; none is left half-written.

    Note:
        Products are float64, rounded once to float32 (float64 for float64 factors). RandLoRA has full rank: its export is
        as large as the weights unless it is shrunk. Of a sharded model every process calls this and gets all factors; the
        first one writes.

    Example:
        >>> import torch
        >>> from lowrank_kernels.adapter_files import export_lora
        >>> from lowrank_kernels.nn import DeepLoRALinear
        >>> model = torch.nn.Sequential(DeepLoRALinear.from_linear(torch.nn.Linear(6, 4), rank=2))
        >>> lora = export_lora(model)["0"]
        >>> lora.a.shape, lora.b.shape
        (torch.Size([2, 6]), torch.Size([4, 2]))
        >>> torch.allclose(lora.b @ lora.a, model[0].get_delta_weight("default"), atol=1e-15)
        True
    """
    model = unwrapped(model)
    team = sharding_team(model)
    with team.together():
        adapter, layers = _chosen("export_lora", model, adapter)
        if folder is not None:
            refuse_peft("export_lora", layers, _PEFT_FILES)
            _check_peft(model, layers)
            weights_path, config_path = Path(folder, "adapter_model.safetensors"), Path(folder, "adapter_config.json")
            if team.rank == 0 and Path(folder).exists():
                if not Path(folder).is_dir():
                    raise OutputError(f"{folder}: a folder was wanted, this is a file")
                for path in (weights_path, config_path):
                    check_output(path, overwrite)
        team.meet(None)
        exported = {}
        for name, layer in layers.items():
            try:
                with gathered(layer):
                    factors = layer.factors(adapter)
                exported[name] = _exact(factors) if shrink is None else shrink_factors(factors, shrink)
            except ValueError as error:
                raise ValueError(f"export_lora: layer {name!r}: {error}") from None
        if folder is not None:
            base = base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None) or None
            config = json.dumps(_peft_config(model, layers, adapter, exported, base), indent=2).encode() + b"\n"
            weights = safetensors.torch.save(_peft_tensors(model, layers, exported), {"format": "pt"})

            def write_both(handle: BinaryIO) -> None:  # the config is on the disk before the weights are replaced
                handle.write(config)
                handle.flush()
                write_atomically(weights_path, lambda inner: inner.write(weights), overwrite)

            if team.rank == 0:
                Path(folder).mkdir(parents=True, exist_ok=True)
                write_atomically(config_path, write_both, overwrite)
            team.meet(None)
    return exported


def _wide(function: str, factors: Factors) -> tuple[torch.dtype, Tensor, Tensor, Tensor | None]:
    """Dtype of the result, then left, right and the product of the cores in float64."""
    for kind, value in zip(("left", "core", "right"), factors[:3], strict=True):
        _check_finite(function, kind, value)
    left, core, right = (None if value is None else value.detach().cpu().double() for value in factors[:3])
    assert left is not None
    assert right is not None
    return (
        torch.float64 if factors.left.dtype == torch.float64 else torch.float32,
        left,
        right,
        core_product(core, factors.shift),
    )


def _check_finite(function: str, kind: str, value: Tensor | None) -> None:
    if value is not None and value.is_meta:
        raise ValueError(f"{function}: {kind} is on the meta device and has no values; load or initialize it first")
    if value is not None and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{function}: {kind} must be finite, got NaN or infinity; go back to an earlier state")


def _rounded(function: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    for kind, value in (("a", a), ("b", b)):
        _check_finite(function, kind, value)
    return a, b


def _exact(factors: Factors) -> LoRAFactors:
    dtype, left, right, product = _wide("export_lora", factors)
    return LoRAFactors(*_rounded("export_lora", right if product is None else product @ right, left * factors.scale, dtype))


def _check_peft(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """What PEFT's own layers would compute otherwise, and names that it would take for others."""
    for whole in trained_modules(model):
        for name in layers:  # PEFT looks at the ends of names, dots or not
            if name.endswith(whole):
                raise ValueError(
                    f"export_lora: PEFT would take the adapted layer {name!r} for {whole!r}, which is trained in full, by the "
                    f"end of its name, and refuse to load; adapt with exclude_modules=[{name!r}], or use folder=None"
                )
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, layer in layers.items():
        base: Any = layer.base_layer
        if not name:
            raise ValueError(
                "export_lora: PEFT adapts layers inside a model, here the model itself is the layer; use folder=None"
            )
        if places[id(layer)] > 1:
            raise ValueError(
                f"export_lora: {name!r} is shared, the model holds it under {places[id(layer)]} names, and PEFT would adapt it "
                "under the first only; use folder=None for the factors, or save_adapter"
            )
        if getattr(base, "padding_mode", "zeros") != "zeros" or any(d != 1 for d in getattr(base, "dilation", ())):
            raise ValueError(
                f"export_lora: PEFT would run {name!r} without its dilation {base.dilation} and padding_mode "
                f"{base.padding_mode!r}; use folder=None for the factors, or merge_and_unload(model)"
            )


def _peft_tensors(
    model: nn.Module, layers: Mapping[str, AdapterLayer], exported: Mapping[str, LoRAFactors]
) -> dict[str, Tensor]:
    tensors = {f"base_model.model.{key}": value for key, value in _trained_tensors("export_lora", model).items()}
    for name, (a, b, _) in exported.items():
        base, key = layers[name].base_layer, f"base_model.model.{name}.lora_"
        if isinstance(base, nn.Embedding):
            tensors[f"{key}embedding_A"], tensors[f"{key}embedding_B"] = a, b
            continue
        if isinstance(base, nn.Conv1d | nn.Conv2d):
            a, b = a.reshape(-1, *base.weight.shape[1:]), b.reshape(*b.shape, *[1] * (base.weight.ndim - 2))
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = a, b
    return tensors


def _peft_config(
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    adapter: str,
    exported: Mapping[str, LoRAFactors],
    base: str | None,
) -> dict[str, Any]:
    ranks = {name: len(lora.a) for name, lora in exported.items()}
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]  # the most common one
    pattern = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    names = sorted(layers)
    suffixes = tuple(f".{name}" for name in names)  # PEFT also takes what ends like a name
    exact = not any(other.endswith(suffixes) and other not in layers for other, _ in model.named_modules())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": names if exact else "|".join(map(re.escape, names)),
        "fan_in_fan_out": any(plain_class(layer.base_layer).__name__ == "Conv1D" for layer in layers.values()),
        "lora_dropout": max(layer.adapters[adapter].dropout for layer in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": list(trained_modules(model)) or None,
        "inference_mode": True,
    }


# ---------------------------------------------------------------------- the native file


class _Place(NamedTuple):
    """What a layer must be for an adapter to fit."""

    base: str  # class of the layer without adapters
    weight_shape: tuple[int, ...]
    matrix_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.base} {'x'.join(map(str, self.weight_shape))}"


class _SavedLayer(NamedTuple):
    info: AdapterInfo
    place: _Place
    tensors: dict[str, Tensor]  # by kind


class _Saved(NamedTuple):
    adapter: str
    model: str  # class of the model
    package_version: str
    layers: dict[str, _SavedLayer]
    trained: dict[str, dict[str, Tensor]]  # module -> its state_dict


def save_adapter(model: nn.Module, path: PathLike, *, adapter: str | None = None, overwrite: bool = False) -> None:
    """Save an adapter, and the modules trained in full beside it, as one ``.safetensors`` file, bit for bit.

    Args:
        model: with adapters; its frozen weights are not saved. Inside ``torch.compile``, ``DistributedDataParallel`` or
            ``nn.DataParallel`` it gives the same file.
        path: the file; the folder must exist.
        adapter: which one; by default the only one, or the active one.
        overwrite: replace an existing file.

    Raises:
        ValueError: no such adapter, or parameters that are not finite; InputError for another extension.
        OutputError: the file exists or cannot be written; the old file, or none, is there.

    Note:
        The same adapter gives the same bytes, also while it is merged. Of a sharded model (``fully_shard``) every process
        calls this, the first one writes, and the others return or raise with it; the file is that of the whole model.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from lowrank_kernels.adapter_files import load_adapter, save_adapter
        >>> from lowrank_kernels.adapters import adapt
        >>> model, other = (torch.nn.Sequential(torch.nn.Linear(6, 4)) for _ in range(2))
        >>> report = adapt(model, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, Path(folder, "adapter.safetensors"))
        ...     report = load_adapter(other, Path(folder, "adapter.safetensors"))
        >>> report.layers, torch.equal(other[0].left["default"], model[0].left["default"])
        (('0',), True)
    """
    model = unwrapped(model)
    team = sharding_team(model)
    with team.together():
        if team.rank == 0:
            check_output(path, overwrite, (".safetensors",))
        adapter, layers = _chosen("save_adapter", model, adapter)
        refuse_peft("save_adapter", layers, _PEFT_FILES)
        team.meet(None)
        tensors, described = _trained_tensors("save_adapter", model), {}
        for name, layer in layers.items():
            described[name] = {**_place(layer)._asdict(), "info": asdict(layer.adapters[adapter])}
            for kind, parameter in layer.adapter_parameters(adapter).items():
                tensors[f"{name}.{kind}"] = _copy("save_adapter", f"{name}.{kind}", parameter)
        config = {
            "format_version": FORMAT_VERSION,
            "package_version": _package_version(),
            "adapter": adapter,
            "model": plain_class(model).__name__,
            "layers": described,
            "trained": trained_modules(model),
        }
        if team.rank == 0:
            data = safetensors.torch.save(tensors, {_KEY: json.dumps(config, allow_nan=False)})
            write_atomically(path, lambda handle: handle.write(data), overwrite)
        team.meet(None)


def load_adapter(model: nn.Module, path: PathLike, *, adapter: str | None = None) -> LoadReport:
    """Load a file of :func:`save_adapter`; all of it, or nothing is changed.

    A model without this adapter gets it as the file says, beside others it may have, and it becomes the active one. A model
    that has it gets the values. Modules that were trained in full get theirs.

    Args:
        model: the base model, or an adapted one.
        path: the file.
        adapter: the name to load it under; by default the saved one.

    Raises:
        InputError: a file that is truncated, of another format or version, or damaged; that holds values that are not
            finite; that was saved from another model (the layers that do not fit are named); adapters that are merged.

    Note:
        Bit for bit, unless the model is of another dtype (the report lists where). Nothing is drawn from torch's own
        random generator. Of a sharded model every process calls this and keeps its part; the model must have the adapter
        already, from before ``fully_shard``.
    """
    model = unwrapped(model)
    team = sharding_team(model)
    with team.together():
        refuse_peft("load_adapter", adapter_layers(model), _PEFT_FILES)
        report, values = _prepared(model, path, adapter)
        team.meet(None)
    for target, value in values:
        assign(target, value)
    return report


def _prepared(model: nn.Module, path: PathLike, adapter: str | None) -> tuple[LoadReport, list[tuple[Tensor, Tensor]]]:
    """The model ready for a file's values, and where they belong."""
    saved = _read(path)
    adapter = saved.adapter if adapter is None else adapter
    added = all(adapter not in layer.adapters for layer in adapter_layers(model).values())
    problems = list(_misfits(model, saved, adapter, added))
    if problems:
        raise InputError(
            f"{path}: does not fit this model (a {type(model).__name__}, the file is of a {saved.model}): "
            f"{_some(problems)}; nothing was loaded"
        )
    modules = {"": model, **first_names(model)}
    dtypes = {name: _dtype(modules[name], adapter, entry, added) for name, entry in saved.layers.items()}
    try:
        cast = {
            name: _cast(name, entry.tensors, dict.fromkeys(entry.tensors, dtypes[name])) for name, entry in saved.layers.items()
        }
        trained = {name: model.get_submodule(name).state_dict() for name in saved.trained}
        cast |= {name: _cast(name, own, {key: trained[name][key].dtype for key in own}) for name, own in saved.trained.items()}
        if added:
            check_free("load_adapter", model, adapter)
            plan = {
                name: {"method": info.method, "dtype": dtypes[name], **info.options}
                for name, (info, _, _) in saved.layers.items()
            }
            install(model, plan, adapter, trained=tuple(saved.trained))
        else:
            train_in_full(model, tuple(saved.trained))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; nothing was loaded") from error
    layers = adapter_layers(model)
    targets: dict[str, Mapping[str, Tensor]] = {name: layers[name].adapter_parameters(adapter) for name in saved.layers}
    targets |= trained
    given = {**{name: entry.tensors for name, entry in saved.layers.items()}, **saved.trained}
    values = [(targets[name][kind], value) for name, own in cast.items() for kind, value in own.items()]
    rounded = tuple(name for name, own in cast.items() if any(own[kind].dtype != given[name][kind].dtype for kind in own))
    report = LoadReport(adapter, tuple(saved.layers), added, rounded, tuple(saved.trained), saved.package_version)
    return report, values


def _place(module: nn.Module) -> _Place:
    base: Any = module.base_layer if isinstance(module, AdapterLayer) else module
    return _Place(plain_class(base).__name__, tuple(base.weight.shape), tuple(matrix_shape(module)))


def _package_version() -> str:
    try:
        return metadata.version("lowrank-kernels")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


# Reading: what a file says is checked before the model is looked at.


def _read(path: PathLike) -> _Saved:
    data = read_head(path, None)
    if data.startswith((b"PK\x03\x04", b"\x80")) and data[8:9] != b"{":  # a safetensors header may be 0x..80 bytes long
        raise InputError(f"{path}: a pickle (torch.save); reading one can run code, only files of save_adapter are read")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error}); copy it again") from None
    text = header.get("__metadata__", {}).get(_KEY)
    if text is None:
        raise InputError(
            f"{path}: a safetensors file, but not of save_adapter (PEFT's are loaded by peft.PeftModel.from_pretrained)"
        )
    try:
        return _parse(json.loads(text), tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path}: its settings are damaged ({type(error).__name__}: {error}); save it again") from None


def _parse(config: Any, tensors: dict[str, Tensor]) -> _Saved:
    version, written_by = config["format_version"], str(config["package_version"])
    if version != FORMAT_VERSION:
        step = "update lowrank-kernels" if isinstance(version, int) and version > FORMAT_VERSION else "save it again"
        raise InputError(
            f"format version {version!r}, written by lowrank-kernels {written_by}; this one reads {FORMAT_VERSION}: {step}"
        )
    for name in ("adapter", "model"):
        if not isinstance(config[name], str):
            raise TypeError(f"{name} is {config[name]!r}")
    types, layers = get_type_hints(AdapterInfo), {}
    problems = [f"{key} is not finite" for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    for name, entry in config["layers"].items():
        info = AdapterInfo(**entry["info"])
        for field, value in asdict(info).items():
            if not isinstance(value, types[field]):
                raise TypeError(f"{field} of {name} is {value!r}")
        place = _Place(entry["base"], tuple(entry["weight_shape"]), tuple(entry["matrix_shape"]))
        shapes = _shapes(info, place.matrix_shape)
        own = {kind: tensors.pop(f"{name}.{kind}") for kind in shapes if f"{name}.{kind}" in tensors}
        problems += [f"{name}.{kind} is missing" for kind in shapes if kind not in own]
        problems += [
            f"{name}.{kind} must be {shapes[kind]}, got {tuple(value.shape)} of {value.dtype}"
            for kind, value in own.items()
            if value.shape != shapes[kind] or value.dtype not in FACTOR_TYPES
        ]
        layers[name] = _SavedLayer(info, place, own)
    trained = {}
    for name in config["trained"]:
        prefix = f"{name}."
        keys = sorted(key for key in tensors if key.startswith(prefix))  # processes write sharded ones in the same order
        trained[name] = {key.removeprefix(prefix): tensors.pop(key) for key in keys}
    problems += [f"{key} belongs to no layer" for key in tensors]
    if problems or not layers:
        raise InputError(f"{_some(problems) or 'no layers in it'}; save it again")
    return _Saved(config["adapter"], config["model"], written_by, layers, trained)


def _shapes(info: AdapterInfo, matrix_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    (rows, columns), k = matrix_shape, info.rank
    if info.method == "randlora":
        count = -(-min(rows, columns) // k)
        return {"lambdas": (k, count), "gammas": (count, min(rows, columns))}
    if info.method not in ("deeplora", "lora"):
        raise ValueError(f"method {info.method!r}")
    core = {"core": (info.depth, k, k)} if info.method == "deeplora" else {}
    return {"left": (rows, k), **core, "right": (k, columns)}


# Fitting it to a model.


def _misfits(model: nn.Module, saved: _Saved, adapter: str, added: bool) -> Iterator[str]:
    """Every reason why the file does not fit the model."""
    layers = adapter_layers(model)
    modules = {**first_names(model), **layers}
    whole = trained_modules(model)
    for name, (info, place, _) in saved.layers.items():
        module, layer = modules.get(name), layers.get(name)
        if module is None:
            yield f"there is no layer {name!r}"
        elif added and within(name, whole):
            yield f"{name!r} is trained in full here (modules_to_train)"
        elif added and any(map(is_sharded, module.parameters())):
            yield f"{name!r} is sharded; load the adapter before fully_shard()"
        elif added and (reason := unsupported(module, info.method)):
            yield f"{name!r}: {reason}"
        elif not added and (layer is None or adapter not in layer.adapters):
            yield f"{name!r} has no adapter {adapter!r}, others have; delete_adapter(model, {adapter!r}) first"
        elif _place(module) != place:
            yield f"{name!r} must be {place}, is {_place(module)}"
        elif (module.base_layer if layer else module).weight.is_meta:  # type: ignore[union-attr]
            yield f"{name!r} is on the meta device; give it storage first, model.to_empty(device=...)"
        elif layer is not None and not added:
            yield from (f"{name!r} {reason}" for reason in _differences(layer, adapter, info))
    for name, layer in layers.items():
        if adapter in layer.adapters and name not in saved.layers:
            yield f"{name!r} has an adapter {adapter!r}, the file has none for it"
    names = dict(model.named_modules())
    for name, tensors in saved.trained.items():
        own = names[name].state_dict() if name in names else {}
        if {key: value.shape for key, value in tensors.items()} != {key: value.shape for key, value in own.items()}:
            yield f"{name!r}, which was trained in full, is not there or has other shapes"


def _differences(layer: AdapterLayer, adapter: str, info: AdapterInfo) -> Iterator[str]:
    if layer.merged:
        yield f"has {', '.join(layer.merged_adapters)} merged; call unmerge() first"
    own = {"method": layer.method, **layer.adapters[adapter].options}
    theirs = {"method": info.method, **info.options}
    how = ("dropout", "init_scale") if info.mode == "paper" else ("dropout",)
    differing = [key for key in theirs if own.get(key) != theirs[key] and key not in how]
    if differing:  # those left out say how to train, not what was learnt
        words = ", ".join(f"{key} {theirs[key]}, not {own.get(key)}" for key in differing)
        yield f"was saved with {words}; delete_adapter(model, {adapter!r}) first, or load it under another name"


def _dtype(module: nn.Module, adapter: str, saved: _SavedLayer, added: bool) -> torch.dtype:
    """Of the adapter in the model: as it is there, else as in the file where the base layer allows that."""
    if isinstance(module, AdapterLayer) and not added:
        return next(iter(module.adapter_parameters(adapter).values())).dtype
    stored, allowed = next(iter(saved.tensors.values())).dtype, FACTOR_TYPES[module.weight.dtype]  # type: ignore[index]
    return stored if stored in allowed else allowed[-1]


def _cast(name: str, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    cast = {kind: value.to(dtypes[kind]) for kind, value in tensors.items()}
    for kind, value in cast.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}.{kind} overflows in {dtypes[kind]}, its dtype in the model")
    return cast


# ---------------------------------------------------------------------- shared


def _chosen(function: str, model: nn.Module, adapter: str | None) -> tuple[str, dict[str, AdapterLayer]]:
    """The adapter that is meant, and the layers that have it."""
    layers = adapter_layers(model)
    names = sorted({name for layer in layers.values() for name in layer.adapters})
    if not names:
        raise ValueError(f"{function}: the model has no adapters; call adapt(model, ...) first")
    if adapter is None:
        active = sorted({name for layer in layers.values() for name in layer.active_adapters})
        candidates = names if len(names) == 1 else active
        if len(candidates) != 1:
            raise ValueError(
                f"{function}: there are several adapters, say which: adapter= one of {', '.join(map(repr, names))}"
            )
        adapter = candidates[0]
    if adapter not in names:
        raise ValueError(f"{function}: no adapter {adapter!r}; there are: {', '.join(map(repr, names))}")
    return adapter, {name: layer for name, layer in layers.items() if adapter in layer.adapters}


def _trained_tensors(function: str, model: nn.Module) -> dict[str, Tensor]:
    """The values of the modules that are trained in full."""
    return {
        f"{name}.{key}": _copy(function, f"{name}.{key}", value)
        for name in trained_modules(model)
        for key, value in model.get_submodule(name).state_dict().items()
    }


def _copy(function: str, name: str, value: Tensor) -> Tensor:
    value = full(value.detach())
    _check_finite(function, name, value)
    return value.cpu().clone(memory_format=torch.contiguous_format)


def _some(problems: list[str], limit: int = 6) -> str:
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")
