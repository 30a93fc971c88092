"""The decode step as a CUDA graph: one launch per token instead of one per kernel.

A graph replays on fixed memory, so it belongs to one set of caches, one batch size, one dtype and
one set of parameter tensors. The cache here is keyed by all of them: it never replays a stale one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mamba_ssm.utils.generation_state import InferenceParams
from mamba_ssm.utils.graphed_step import capturing

Run = Callable[[Tensor, Tensor, int], Tensor]
T = TypeVar("T")


@dataclass
class DecodingCGCache:
    """Captured decode steps of one model, stored as `model._decoding_cache`.

    Attributes:
        max_batch_size, max_seqlen, device, dtype: what the current graphs were captured for.
        callables: (batch_size, decoding_seqlen) -> run(input_ids, position_ids, seqlen) -> logits.
        mempool: memory pool that the graphs share.
        inference_params: the caches that the graphs read and write.
        run: picks the callable that fits its input_ids.
        key: everything else that a capture depends on: see `_capture_key`.
        choosers: captured choices of the next token, by their settings.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Run] = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Run | None = None
    key: tuple = ()
    choosers: dict[tuple, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple:
        """A copy of a model, or its pickle, starts without graphs: they are of its memory."""
        return DecodingCGCache, ()


@torch.inference_mode()
def update_graph_cache(
    model: nn.Module,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """A cache whose graphs fit the arguments: `cache` itself, or a fresh capture.

    `cache` is kept only for exactly this batch size (a smaller batch would replay a graph whose
    states have other rows), dtype, device and parameters, and at least this `max_seqlen`.
    Its `inference_params` are reset: the next call must be a prefill (or restore a state).

    Args:
        model: on a CUDA device, with `allocate_inference_cache`.
        cache: what the previous call returned, or None.
        batch_size: rows of the decode step.
        seqlen_og: length of the prompt.
        max_seqlen: longest sequence, prompt included.
        decoding_seqlens: how many tokens a step may have.
        dtype: of the caches; None leaves it to each layer.
        n_warmups: runs before the capture.

    Raises:
        ValueError: if the model is not on a CUDA device, or has attention layers: their step
            depends on a length that a graph would freeze.
    """
    device = next(iter(model.parameters())).device
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a model on a CUDA device, this one is on {device}")
    if has_attention(model):
        raise ValueError("CUDA graphs do not serve models with attention layers: pass cg=False")
    max_seqlen = max(max_seqlen, seqlen_og + max(decoding_seqlens))
    key = _capture_key(model, batch_size)
    fits = (
        cache is not None
        and (cache.device, cache.dtype, cache.key) == (device, dtype, key)
        and cache.max_batch_size == batch_size
        and cache.max_seqlen >= max_seqlen
    )
    if not fits:
        params = InferenceParams(max_seqlen, batch_size)
        params.key_value_memory_dict = model.allocate_inference_cache(
            batch_size, max_seqlen, dtype=dtype
        )
        params.lengths_per_sample = torch.zeros(batch_size, dtype=torch.int32, device=device)
        cache = DecodingCGCache(
            max_batch_size=batch_size,
            max_seqlen=max_seqlen,
            device=device,
            dtype=dtype,
            mempool=torch.cuda.graph_pool_handle(),
            inference_params=params,
            key=key,
        )
    for length in decoding_seqlens:
        if (batch_size, length) not in cache.callables:
            cache.callables[batch_size, length] = capture_graph(
                model,
                cache.inference_params,
                batch_size,
                cache.max_seqlen,
                length,
                mempool=cache.mempool,
                n_warmups=n_warmups,
            )
    callables = cache.callables

    def dispatch(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return callables[tuple(input_ids.shape)](input_ids, position_ids, seqlen)

    cache.run = dispatch
    cache.inference_params.reset(cache.max_seqlen, batch_size)
    return cache


def capture_graph(
    model: nn.Module,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Run:
    """Capture one decode step; the contents of the caches are lost.

    Returns:
        run(input_ids (b, s) int64, position_ids (b, s) int64, seqlen) -> logits (b, s, vocab),
        which advances the caches of `inference_params` in place.
    """
    device = next(iter(model.parameters())).device
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    offset_before = inference_params.seqlen_offset
    # Anything > 0 selects the decode path; this is the last position that fits.
    inference_params.seqlen_offset = max(1, max_seqlen - decoding_seqlen)

    make = getattr(model, "decode_step", None)
    fused = make(batch_size) if make is not None and decoding_seqlen == 1 else None

    def step() -> Tensor:
        if fused is not None:
            caches = inference_params.key_value_memory_dict
            return fused(input_ids.view(-1), caches).unsqueeze(1)
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    try:
        graph, logits = record(step, device, mempool, n_warmups)
    finally:
        inference_params.seqlen_offset = offset_before

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        if inference_params.lengths_per_sample is not None:
            inference_params.lengths_per_sample.fill_(seqlen)
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    run.input_ids, run.logits, run.graph = input_ids, logits, graph
    return run


def record(
    step: Callable[[], T],
    device: torch.device,
    mempool: Any = None,
    n_warmups: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Run `step` a few times, then capture it: (graph, what the captured run returned).

    Weights that autocast converts are converted by the graph itself at every replay: a cached copy
    would be gone, or that of older weights, by then. `generator`, and torch's global one, may draw
    in the step; a replay moves them on as the step itself would.
    """
    autocast = torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
    with torch.cuda.device(device), autocast:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(1, n_warmups)):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with capturing(graph, mempool):
            result = step()
    return graph, result


def _capture_key(model: nn.Module, batch_size: int) -> tuple:
    """The memory that a graph reads, autocast, and what the model adds in `_graph_key()`."""
    addresses = tuple(t.data_ptr() for t in _tensors(model))
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    extra = model._graph_key(batch_size) if hasattr(model, "_graph_key") else ()
    return (addresses, autocast, extra)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in an order of this function's own.

    torch's iterators walk over the modules twice, in generators as deep as the modules are nested,
    which takes the host several times as long before every prompt.
    """
    if not isinstance(model, nn.Module):  # a client's wrapper, which answers for what it wraps
        return [*model.parameters(), *model.buffers()]
    waiting, seen, found = [model], set(), []
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        own = module.__dict__
        found += own["_parameters"].values()
        found += own["_buffers"].values()
        waiting += own["_modules"].values()
    return [t for t in found if t is not None]


def has_attention(model: nn.Module) -> bool:
    """Whether the model's config names attention layers (a hybrid model)."""
    return bool(getattr(getattr(model, "config", None), "attn_layer_idx", None))
