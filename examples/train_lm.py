"""Train a byte-level Mamba language model on text that every machine has.

By default the text is the Python standard library's sources. The script reports held-out bits per
byte beside a 5-gram baseline on the same text, and exports a checkpoint for `from_pretrained`.

    python examples/train_lm.py --out runs/smoke                               # CPU, under a minute
    python examples/train_lm.py --preset embedded --amp bf16 --out runs/embedded        # a GPU
    python examples/train_lm.py --preset embedded --amp bf16 --out runs/embedded --resume

Install the package first, or set PYTHONPATH to the root of the repository. The run is reproducible
from its seed, and a resumed run continues the interrupted one exactly.
"""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import heldout
import ngram
import torch
import training_files as files
from torch import Tensor, nn
from train_options import DTYPES, parse_options, run_settings

from mamba_ssm.utils.graphed_step import GraphedStep

VOCAB_SIZE = 384  # ByT5Tokenizer: 3 special ids, 256 bytes, 125 spare
BASELINE_ORDER = 5


def build_model(args: Any) -> nn.Module:
    """A MambaLMHeadModel drawn from `args.seed`: the same weights whatever the device."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(args.seed)
    config = MambaConfig(
        d_model=args.d_model,
        n_layer=args.n_layer,
        vocab_size=VOCAB_SIZE,
        ssm_cfg={"d_state": args.d_state, "expand": args.expand},
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=8,
        tie_embeddings=True,
    )
    return MambaLMHeadModel(config).to(args.device)


def learning_rate(step: int, args: Any) -> float:
    """Linear warm-up, then a cosine from `lr` down to `min_lr_ratio · lr` at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - 1 - args.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * cosine)


class Crops:
    """Random pieces of one token stream that lies on the device as a whole.

    A piece from the middle of a file is read from a zero state, as if nothing stood before it. With
    those alone a model takes every prompt for the middle of a file, so some pieces begin where a
    document does: at the end mark before it, or, as a prompt does, behind that mark.

    Text that is read several times is learnt by heart. Hiding some of the bytes that the model
    reads, not those that it predicts, delays that (word dropout, Iyyer et al. 2015).
    """

    def __init__(self, documents: Sequence[corpus.Document], args: Any) -> None:
        stream = torch.from_numpy(corpus.token_stream(documents))
        self.last_start = len(stream) - args.seq_len
        if self.last_start < 0:
            raise corpus.CorpusError(
                f"the training text has {len(stream)} tokens, fewer than --seq-len {args.seq_len}"
            )
        marks = (stream == corpus.EOS_ID).nonzero().flatten()
        self.beginnings = marks[marks < self.last_start]
        # Whole rows of each batch; none if no document leaves room for a piece.
        self.rows_at_beginnings = round(args.batch_size * args.document_starts)
        if len(self.beginnings) == 0:
            self.rows_at_beginnings = 0
        self.stream = stream.to(args.device)
        self.batch_size = args.batch_size
        self.window = torch.arange(args.seq_len, device=args.device)
        # On the CPU, so that the data do not depend on the device and the state is easy to store.
        self.generator = torch.Generator().manual_seed(args.seed)

        self.starts = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=args.device)
        self.hidden_bytes = args.hidden_bytes
        self.hidden = torch.zeros(
            self.batch_size, args.seq_len, dtype=torch.bool, device=args.device
        )

    def advance(self) -> None:
        """Draw the places of the next batch."""
        shape = self.starts.shape
        starts = torch.randint(self.last_start + 1, shape, generator=self.generator)
        rows = self.rows_at_beginnings
        if rows:
            which = torch.randint(len(self.beginnings), (rows, 1), generator=self.generator)
            behind = torch.randint(2, (rows, 1), generator=self.generator)
            starts[:rows] = self.beginnings[which] + behind
        self.starts.copy_(starts)
        if self.hidden_bytes:
            draws = torch.rand(self.hidden.shape, generator=self.generator)
            self.hidden.copy_(draws < self.hidden_bytes)

    def batch(self) -> tuple[Tensor, Tensor]:
        """What the model reads in the present step, and the text itself.

        Both are ids, (batch_size, seq_len) int64, and the same if no bytes are hidden.
        """
        ids = self.stream[self.starts + self.window].long()
        if not self.hidden_bytes:
            return ids, ids
        return torch.where(self.hidden & (ids != corpus.EOS_ID), corpus.UNKNOWN_ID, ids), ids


class Trainer:
    """One training run: its model, optimizer, data and position."""

    def __init__(self, args: Any, documents: Sequence[corpus.Document]) -> None:
        from mamba_ssm.utils.optim import param_groups

        self.args = args
        self.device = torch.device(args.device)
        self.sha256 = corpus.corpus_sha256(documents)
        training, self.held_out = corpus.split_documents(documents)
        self.crops = Crops(training, args)
        self.model = build_model(args)
        files.check_export_size(self.model, DTYPES[args.export_dtype], args.max_bytes)
        self.forward = torch.compile(self.model) if args.compile else self.model
        groups = param_groups(self.model, weight_decay=args.weight_decay)
        graph = args.graph and self.device.type == "cuda"
        # With a graph the learning rate is a tensor, which the captured kernels read.
        self.lr = torch.tensor(args.lr, device=self.device) if graph else args.lr
        self.how = {"fused": self.device.type == "cuda", "capturable": graph}
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), **self.how)
        self.graphed = GraphedStep(self._work, self.device, enabled=graph)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.step = 0
        self.seconds = 0.0
        # Kept on the device: reading the loss at every step would stall it.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_count = 0

    def autocast(self) -> torch.autocast:
        dtype = DTYPES.get(self.args.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _work(self) -> None:
        """What a step does on the device; it waits for nothing, so that a graph can hold it."""
        input_ids, labels = self.crops.batch()
        with self.autocast():
            loss = self.forward(input_ids, labels=labels).loss
        self.scaler.scale(loss).backward()
        if self.args.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach().double()

    def train_step(self) -> None:
        """One optimizer step on one batch."""
        self.set_learning_rate(learning_rate(self.step, self.args))
        self.crops.advance()
        self.graphed()
        self.loss_count += 1
        self.step += 1

    def set_learning_rate(self, lr: float) -> None:
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr if isinstance(self.lr, Tensor) else lr

    def take_mean_loss(self) -> float:
        """Mean training loss since the last call, in bits per byte."""
        mean = float(self.loss_sum) / self.loss_count / math.log(2)
        self.loss_sum.zero_()
        self.loss_count = 0
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step}; lower --lr, or use --amp off or bf16"
            )
        return mean

    def evaluate(self) -> float:
        """Held-out bits per byte of the model as it is now."""
        with self.autocast():
            return heldout.bits_per_byte(self.model, self.held_out)

    def state(self) -> dict[str, Any]:
        """All that is needed to continue exactly."""
        return {
            "settings": run_settings(self.args),
            "corpus_sha256": self.sha256,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data_generator": self.crops.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up `state`. ValueError if it belongs to another run, naming the difference."""
        if state["corpus_sha256"] != self.sha256:
            raise ValueError(
                f"the run was started on other text (sha256 {state['corpus_sha256']}, now "
                f"{self.sha256}); resume with the same files, or carry them with --corpus"
            )
        now, before = run_settings(self.args), state["settings"]
        changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
        if changed:
            what = ", ".join(
                f"--{k.replace('_', '-')} {before.get(k)} (now {now.get(k)})" for k in changed
            )
            raise ValueError(f"resume with the options that the run was started with: {what}")
        self.model.load_state_dict(state["model"])
        # The run may go on on another device, or with and without a graph.
        groups = [group | self.how for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.crops.generator.set_state(state["data_generator"])
        torch.set_rng_state(state["torch_generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum.fill_(state["loss_sum"])
        self.loss_count = state["loss_count"]

    def run(self, checkpoint: Path, log: files.MetricsLog) -> None:
        """Train to the last step, or until the time is over; leaves a checkpoint."""
        from tqdm import tqdm

        args = self.args
        before, start = self.seconds, time.monotonic()
        # disable=None: no bar where the output is not a terminal.
        with tqdm(total=args.steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < args.steps:
                self.train_step()
                bar.update()
                self.seconds = before + time.monotonic() - start
                out_of_time = args.minutes and time.monotonic() - start > 60 * args.minutes
                last = out_of_time or self.step == args.steps
                if self.step % args.log_every == 0 or last:
                    bits = self.take_mean_loss()
                    bar.set_postfix(bits_per_byte=f"{bits:.3f}")
                    lr = learning_rate(self.step - 1, args)
                    seconds = round(self.seconds, 2)
                    log.add(step=self.step, train_bits_per_byte=bits, lr=lr, seconds=seconds)
                if self.step % args.eval_every == 0 or last:
                    held_out = self.evaluate()
                    log.add(step=self.step, heldout_bits_per_byte=held_out)
                    bar.write(
                        f"step {self.step}/{args.steps}  {self.seconds:.0f} s  "
                        f"held out {held_out:.4f} bits per byte"
                    )
                if self.step % args.save_every == 0 or last:
                    files.save_checkpoint(checkpoint, self.state())
                if out_of_time:
                    return


def held_out_slices(trainer: Trainer, model: nn.Module) -> list[dict[str, Any]]:
    """A few beginnings of held-out files with their score, to check the model by later."""
    size = trainer.args.held_out_slice
    rows = []
    for document in sorted(trainer.held_out, key=lambda d: len(d.data), reverse=True)[:4]:
        piece = corpus.Document(document.path, document.data[:size])
        rows.append(
            {
                "path": piece.path,
                "bytes": len(piece.data),
                "sha256": hashlib.sha256(piece.data).hexdigest(),
                "bits_per_byte": heldout.bits_per_byte(model, [piece]),
            }
        )
    return rows


def export_and_score(
    trainer: Trainer, documents: Sequence[corpus.Document], command: str
) -> dict[str, Any]:
    """Write the model's directory, load it again as a user would, and record how good it is."""
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    args = trainer.args
    directory = Path(args.export or Path(args.out) / "model")
    dtype = DTYPES[args.export_dtype]
    exported = files.export_model(trainer.model, directory, dtype, args.max_bytes)

    scores = {}
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = MambaLMHeadModel.from_pretrained(
            str(directory), device=args.device, dtype=precision
        )
        scores[name] = heldout.bits_per_byte(model, trainer.held_out)
    device = trainer.device
    metrics = {
        "command": command,
        "settings": run_settings(args) | {"compile": args.compile, "graph": args.graph},
        "steps_done": trainer.step,
        "tokens_seen": trainer.step * args.batch_size * args.seq_len,
        "seconds": round(trainer.seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": exported,
        "corpus": {
            "sha256": trainer.sha256,
            "files": len(documents),
            "bytes": corpus.total_bytes(documents),
            "heldout_files": len(trainer.held_out),
            "heldout_bytes": corpus.total_bytes(trainer.held_out),
        },
        "heldout_bits_per_byte": scores,
        "baseline": {
            "model": f"{BASELINE_ORDER}-gram, interpolated modified Kneser-Ney",
            "heldout_bits_per_byte": ngram.baseline_bits_per_byte(documents, BASELINE_ORDER),
        },
        "heldout_slices": held_out_slices(trainer, model),
        "sample": heldout.sample_text(model, args.sample_prompt, 300),
    }
    files.write_json(directory / "metrics.json", metrics)
    return metrics


def report(metrics: dict[str, Any]) -> None:
    """Print the results for people."""
    scores, baseline = metrics["heldout_bits_per_byte"], metrics["baseline"]
    print(f"{metrics['model']['parameters']:,} parameters", end=", ")
    print(f"{metrics['model']['safetensors_bytes']:,} bytes as {metrics['model']['dtype']}")
    print(f"held-out bits per byte: {scores['fp32']:.4f} (fp32), {scores['bf16']:.4f} (bf16)")
    print(f"  {baseline['model']}: {baseline['heldout_bits_per_byte']:.4f}")
    print(f"sample, greedy:\n{metrics['sample']}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse_options(__doc__.split("\n\n")[0], argv)
    words = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "examples/train_lm.py", *words])
    out = Path(args.out)
    checkpoint = out / "checkpoint.pt"
    try:
        documents = corpus.documents_from_options(args)
        print(corpus.describe(documents), flush=True)
        trainer = Trainer(args, documents)
        if args.resume:
            trainer.load_state(files.load_checkpoint(checkpoint))
            print(f"resuming at step {trainer.step} of {args.steps}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        log = files.MetricsLog(out / "metrics.jsonl", trainer.step if args.resume else None)
        trainer.run(checkpoint, log)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_lm.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    metrics = export_and_score(trainer, documents, command)
    if args.loss_curve:
        baseline = metrics["baseline"]["heldout_bits_per_byte"]
        files.plot_loss(log.rows, Path(args.loss_curve), baseline)
    report(metrics)
    return metrics


if __name__ == "__main__":
    main()
