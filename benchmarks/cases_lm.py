"""Language model cases: decoding, prefill, long prompts, and transformers on this library's ops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import peers_llama
import peers_torch
import torch
from bandwidth import Reader
from measuring import (
    OURS,
    Contest,
    Contestant,
    Row,
    Target,
    measure,
    peak_memory_mb,
    resident_mb,
    settle,
)
from models import GGUF, Lab, OurModel, say

from mamba_ssm.models.config_mamba import MambaConfig

FLOOR = "reading the weights"
# Peers stop decoding after so many seconds of a round: they suffer most on a busy machine.
_LONGEST = 3.0


@dataclass
class Bench:
    """What every case gets: options, and the models, made once per shape."""

    threads: int
    rounds: int
    shape: str = "130m"
    budget: float = 60.0
    labs: dict[str, Lab] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lab(self, shape: str | None = None) -> Lab:
        """The models of a shape (default: the one that was asked for)."""
        shape = shape or self.shape
        if shape not in self.labs:
            self.labs[shape] = Lab(shape, self.threads)
        return self.labs[shape]

    def free(self, shape: str) -> None:
        """Drop the models of a shape, remembering which of them disagreed."""
        if shape in self.labs:
            lab = self.labs.pop(shape)
            self.problems += lab.disagreements
            lab.close()


def _llama_decode(lab: Lab, kind: str, batch: int, steps: int) -> Callable[[], float]:
    llama = lab.llama(kind)
    first = lab.ids(batch, 1).flatten().tolist()

    def run() -> float:
        llama.reset(batch)
        llama.step(first, 0)
        start = time.perf_counter()
        for i in range(steps):
            llama.step(first, 1 + i)  # no sampling, to its advantage
            elapsed = time.perf_counter() - start
            if elapsed > _LONGEST:
                return elapsed * steps / (i + 1)
        return elapsed

    return run


def discarding(function: Callable, *arguments: object) -> Callable[[], None]:
    """A call whose result is thrown away: the whole of it is timed."""

    def run() -> None:
        function(*arguments)

    return run


def _peer(contest: Contest, name: str, reason: str | None, make: Callable[[], Contestant]) -> None:
    if reason is None:
        contest.contestants.append(make())
    else:
        contest.absent.append((name, reason))


def _decode_contest(lab: Lab, kind: str, batch: int, steps: int, targets: list[Target]) -> Contest:
    case = f"{lab.shape} decode batch {batch} {kind}"
    contest = Contest(case, "tokens/s", steps * batch, [], targets)
    prompt, ours = lab.ids(batch, 4), lab.ours(kind)
    if ours is None:
        contest.absent.append((OURS, "this version has no int8 weights (model.quantize_)"))
    else:
        contest.contestants.append(
            Contestant(OURS, lambda: ours.decode(prompt, steps), lambda: ours.decode(prompt, 2))
        )
    llama = f"llama.cpp {GGUF[kind]}"
    _peer(
        contest,
        llama,
        peers_llama.why_absent(),
        lambda: Contestant(
            llama, _llama_decode(lab, kind, batch, steps), _llama_decode(lab, kind, batch, 2)
        ),
    )
    if kind != "int8" and lab.shape != "370m":
        few = max(2, steps // 4)

        def theirs() -> float:
            return lab.transformers(kind).decode(prompt, few) * steps / few

        reason = peers_torch.why_absent("transformers")
        _peer(contest, "transformers", reason, lambda: Contestant("transformers", theirs))
    return contest


def _decode(bench: Bench, lab: Lab, batch: int, plan: dict[str, list[Target]]) -> list[Row]:
    steps = 16 if batch == 1 else 6
    contests = [_decode_contest(lab, kind, batch, steps, targets) for kind, targets in plan.items()]
    reader = None
    if batch == 1:
        reader = Reader(max(map(lab.weight_bytes, plan)), bench.threads)
        for kind, contest in zip(plan, contests, strict=True):
            size = lab.weight_bytes(kind)
            floor = Contestant(
                FLOOR, lambda size=size: sum(reader.read(size) for _ in range(steps))
            )
            contest.contestants.append(floor)
    rows = measure(contests, bench.rounds, bench.budget)
    if reader is not None:
        reader.close()
    return rows


def decode(bench: Bench) -> list[Row]:
    """One token at a time, batch 1; targets against llama.cpp and the bandwidth floor."""
    return _decode(
        bench,
        bench.lab(),
        1,
        {
            "fp32": [Target("llama.cpp f32", 1.2), Target(FLOOR, 0.85)],
            "bf16": [Target("llama.cpp bf16", 1.35), Target(FLOOR, 0.85)],
            "int8": [Target("llama.cpp q8_0", 1.6), Target(FLOOR, 0.75)],
        },
    )


def decode16(bench: Bench) -> list[Row]:
    """Sixteen sequences at once."""
    plan = {"fp32": [Target("llama.cpp f32", 3)], "bf16": [Target("llama.cpp bf16", 4.5)]}
    return _decode(bench, bench.lab(), 16, plan)


def _prefill_contest(
    lab: Lab, kind: str, length: int, targets: list[Target], torch_peers: dict[str, int]
) -> Contest:
    contest = Contest(f"{lab.shape} prefill {length} {kind}", "tokens/s", length, [], targets)
    ids, short, ours = lab.ids(1, length), lab.ids(1, 32), lab.ours(kind)

    def fair(name: str, prefill: Callable, max_rounds: int | None = None) -> Contestant:
        return Contestant(name, discarding(prefill, ids), discarding(prefill, short), max_rounds)

    contest.contestants.append(Contestant(OURS, discarding(ours.prefill, ids)))
    name = f"llama.cpp {GGUF[kind]}"
    _peer(
        contest,
        name,
        peers_llama.why_absent(),
        lambda: fair(name, lab.llama(kind).prefill),
    )
    for name, max_rounds in torch_peers.items():
        mambapy = "mambapy" in name
        reason = peers_torch.why_absent("transformers")
        reason = reason or (peers_torch.why_absent("mambapy") if mambapy else None)
        options = {"mambapy": True} if mambapy else {}
        _peer(
            contest,
            name,
            reason,
            lambda name=name, options=options, most=max_rounds: fair(
                name, lab.transformers(kind, **options).prefill, most
            ),
        )
    return contest


def prefill(bench: Bench) -> list[Row]:
    """Prompts of 512 tokens (fp32, bf16) and 2048 tokens (fp32) into a fresh state."""
    lab = bench.lab()
    fp32, bf16 = [Target("llama.cpp f32", 2.8)], [Target("llama.cpp bf16", 5)]
    short = [
        _prefill_contest(lab, "fp32", 512, fp32, {"transformers": 2, "transformers + mambapy": 3}),
        _prefill_contest(lab, "bf16", 512, bf16, {"transformers": 2}),
    ]
    rows = measure(short, bench.rounds, bench.budget)
    long = _prefill_contest(lab, "fp32", 2048, fp32, {"transformers": 1})
    return rows + measure([long], max(2, bench.rounds // 2), bench.budget)


def larger(bench: Bench) -> list[Row]:
    """mamba-370m's shape: prefill 512 in fp32, decoding in bf16."""
    lab = bench.lab("370m")
    contest = _prefill_contest(lab, "fp32", 512, [Target("llama.cpp f32", 3)], {})
    rows = measure([contest], max(2, bench.rounds // 2), bench.budget / 2)
    plan = {"bf16": [Target("llama.cpp bf16", 1.3)]}
    rows += _decode(bench, lab, 1, plan)
    if bench.shape != "370m":
        bench.free("370m")
    return rows


def _feeder(ours: OurModel, vocab: int, chunk: int) -> Callable[[], float]:
    """A function that feeds the next random chunk of a sequence and tells the seconds."""
    consume = ours.chunk_runner(chunk)
    generator = torch.Generator().manual_seed(0)

    def feed() -> float:
        ids = torch.randint(0, vocab, (1, chunk), generator=generator)
        start = time.perf_counter()
        consume(ids)
        return time.perf_counter() - start

    feed()  # the first chunk has no past; every later one continues
    return feed


def _stream(
    case: str, ours: OurModel, vocab: int, total: int, chunk: int, seconds: float
) -> list[Row]:
    """Feed ``total`` tokens in chunks. In the last quarter every chunk is timed together with a
    chunk near the start of another sequence: the cost must not depend on the position."""
    deep, shallow = (_feeder(ours, vocab, chunk) for _ in range(2))
    deep(), shallow()
    wanted, began = total // chunk - 2, time.perf_counter()
    times: list[float] = []
    ratios: list[float] = []

    def rest() -> None:
        while len(times) < wanted and time.perf_counter() - began < seconds:
            if len(times) >= 0.75 * wanted and len(ratios) < 16:
                reference = shallow()
                times.append(deep())
                ratios.append(times[-1] / reference)
            else:
                times.append(deep())

    base = resident_mb()
    settle()
    peak = peak_memory_mb(rest)
    end = resident_mb()
    reached = (len(times) + 2) * chunk
    rates = sorted(chunk / t for t in times)
    note = f"{reached:,} tokens in chunks of {chunk}"
    stopped = (
        "" if len(times) == wanted else f"stopped after {seconds:.0f} s, at {reached:,} tokens"
    )
    speed = Row(
        case, OURS, statistics.median(rates), "tokens/s", rates[0], rates[-1], len(times), note=note
    )
    flat = Row(case, "a token late / early in the text", unit="x", target="<= 1.1 x", note=stopped)
    flat.value = statistics.median(ratios) if ratios else None
    growth = None if base is None or end is None else end - base
    memory = Row(case, "memory kept beyond the first chunks", growth, "MB", target="<= 16 MB")
    for row, bound in ((flat, 1.1), (memory, 16)):
        row.verdict = "no verdict" if stopped or row.value is None else "met"
        if row.verdict == "met" and row.value > bound:
            row.verdict = "MISSED"
    within = "" if peak is None else f"highest within a chunk +{peak:.0f} MB"
    memory.note = "; ".join(filter(None, [within, stopped]))
    return [speed, flat, memory]


def long(bench: Bench) -> list[Row]:
    """A prompt of 65,536 tokens in chunks of 2048: flat cost per token, flat memory."""
    lab = bench.lab()
    case = f"{lab.shape} prefill 65536 fp32"
    return _stream(case, lab.ours("fp32"), lab.vocab, 65_536, 2048, 3 * bench.budget)


def million(bench: Bench) -> list[Row]:
    """A million tokens through a small model in chunks of 8192."""
    lab = bench.lab("tiny")
    case = "1M tokens, small model"
    return _stream(case, lab.ours("fp32"), lab.vocab, 2**20, 8192, 2 * bench.budget)


def client(bench: Bench) -> list[Row]:
    """transformers' MambaForCausalLM on this library's ops against its own PyTorch code."""
    reason = peers_torch.why_absent("transformers")
    name, mine = "transformers, own code", "transformers, our ops"
    if reason is not None:
        return [Row("transformers on our ops", name, note=reason)]
    lab = bench.lab()
    config = MambaConfig(d_model=768, n_layer=2, vocab_size=1024)
    from mamba_ssm import MambaLMHeadModel

    small = MambaLMHeadModel(config)
    trained = [
        peers_torch.TransformersModel(small, torch.float32, ours=ours) for ours in (True, False)
    ]
    batch = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    results = [model.train_step(batch) for model in trained]
    for key, value in results[0].items():
        error = (value - results[1][key]).norm() / results[1][key].norm().clamp(min=1e-12)
        if not error < 1e-3:
            bench.problems.append(f"transformers on our ops: {key} differs by {error:.2g}")
    models = [lab.transformers("fp32", ours=True), lab.transformers("fp32")]
    prompt, long_prompt = lab.ids(1, 8), lab.ids(1, 512)
    if not torch.equal(*(model.generate(prompt, 8) for model in models)):
        bench.problems.append("transformers on our ops: generate gives other tokens")

    def contest(case: str, unit: str, amount: float, runs: list[Callable]) -> Contest:
        # What was compared above has warmed everything up.
        pair = [
            Contestant(n, run, lambda: None, max_rounds=most)
            for n, run, most in zip((mine, name), runs, (None, 2), strict=True)
        ]
        return Contest(f"transformers on our ops: {case}", unit, amount, pair, ours=mine)

    runs = {
        ("prefill 512 fp32", "tokens/s", 512): [discarding(m.prefill, long_prompt) for m in models],
        ("generate 8 fp32", "tokens/s", 8): [discarding(m.generate, prompt, 8) for m in models],
        ("training step, 2 layers, 2 x 64, fp32", "ms", 1): [
            discarding(m.train_step, batch) for m in trained
        ],
    }
    contests = [contest(*key, pair) for key, pair in runs.items()]
    say("  timing transformers on both")
    return measure(contests, min(bench.rounds, 3), bench.budget)
