"""Truncated back-propagation through time: training on segments, the state carried along.

Each row of the batch reads a part of the text in order, segment by segment. The state that a
segment leaves is where the next one starts, so nothing is ever forgotten at a boundary; what is
truncated is the gradient:

- ``--through 1``: the state is detached after every segment (the usual truncated BPTT);
- ``--through K``: gradients flow through the states of K segments before they are cut;
- ``--reset``: no state is carried, as in training on separate pieces, for comparison.

First it is checked that segments with a differentiable state give the gradient of one long pass.

    python examples/tbptt.py                  # detached
    python examples/tbptt.py --through 4      # differentiable over four segments
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import corpus
import torch
import torch.nn.functional as F
from tqdm import trange

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.optim import param_groups


def streams(batch: int, length: int) -> torch.Tensor:
    """(batch, length) token ids: each row reads a part of Python's standard library in order."""
    data = bytearray()
    for document in corpus.stdlib_documents():
        data += document.data + b"\n"
        if len(data) >= batch * length:
            break
    ids = torch.frombuffer(data[: batch * length], dtype=torch.uint8).long() + corpus.BYTE_OFFSET
    return ids.view(batch, -1)


def detached(state: list) -> list:
    """The same state, cut off from the graph that made it."""
    return [tuple(part.detach() for part in layer) for layer in state]


def segment_loss(model, ids, targets, state) -> tuple[torch.Tensor, list]:
    """(mean cross-entropy of each position (l,), state after the segment).

    Targets are given rather than ``labels=``, because the last position predicts the first token of
    the next segment.
    """
    out = model(ids, initial_state=state, return_final_state=True)
    losses = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(ids.shape).mean(dim=0), out.final_state


def gradient_difference(model, ids: torch.Tensor, segment: int) -> float:
    """The largest difference between gradients of one long pass and of segments, relative."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    gradients = []
    for size in (inputs.shape[1], segment):
        model.zero_grad()
        state, total = None, 0.0
        for part, target in zip(inputs.split(size, 1), targets.split(size, 1), strict=True):
            losses, state = segment_loss(model, part, target, state)
            total = total + losses.sum()
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    whole, parts = gradients
    return ((whole - parts).abs().max() / whole.abs().max()).item()


def train(model, ids: torch.Tensor, options: argparse.Namespace) -> None:
    """One pass over the streams, an optimizer step for every ``through`` segments."""
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=5e-3)
    count = (ids.shape[1] - 1) // options.segment
    state, loss = None, 0.0
    with trange(count, desc="training") as bar:
        for i in bar:
            at = slice(i * options.segment, (i + 1) * options.segment)
            after = slice(at.start + 1, at.stop + 1)
            losses, state = segment_loss(model, ids[:, at], ids[:, after], state)
            loss = loss + losses.mean()
            if (i + 1) % options.through == 0 or i + 1 == count:
                optimizer.zero_grad()
                (loss / options.through).backward()
                optimizer.step()
                loss, state = 0.0, detached(state)
                bar.set_postfix(bits=f"{losses.mean().item() / math.log(2):.2f}")
            if options.reset:
                state = None


@torch.no_grad()
def bits_at_segment_starts(model, ids: torch.Tensor, segment: int, carry: bool) -> float:
    """Bits per byte over the first eight positions of all segments but the first."""
    state, found = None, []
    for start in range(0, ids.shape[1] - segment, segment):
        at, after = slice(start, start + segment), slice(start + 1, start + segment + 1)
        losses, state = segment_loss(model, ids[:, at], ids[:, after], state if carry else None)
        found.append(losses[:8].mean().item())
    return sum(found[1:]) / len(found[1:]) / math.log(2)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; the gradient's difference and the bits per byte after a boundary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=120, help="segments of each stream")
    parser.add_argument("--segment", type=int, default=64, help="tokens in a segment")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--through", type=int, default=1, help="segments a gradient flows through")
    parser.add_argument("--reset", action="store_true", help="carry no state")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.reset and options.through > 1:
        parser.error("--reset carries no state for a gradient to flow through: use --through 1")
    torch.manual_seed(options.seed)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=corpus.NUM_IDS)
    model = MambaLMHeadModel(config)
    ids = streams(options.batch, (options.segments + 20) * options.segment + 1)

    results = {"gradient difference": gradient_difference(model, ids[:2, :257], options.segment)}
    print(
        "one pass against segments with a differentiable state: gradients differ by "
        f"{results['gradient difference']:.1e} of the largest"
    )
    split = options.segments * options.segment + 1
    train(model, ids[:, :split], options)
    for name, carry in (("carried", True), ("reset", False)):
        bits = bits_at_segment_starts(model, ids[:, split:], options.segment, carry)
        results[f"bits, {name}"] = bits
        print(f"first 8 bytes after a boundary, state {name}: {bits:.3f} bits per byte")
    return results


if __name__ == "__main__":
    main()
