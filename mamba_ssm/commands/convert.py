"""``python -m mamba_ssm convert``: a checkpoint from one format to the other, without loss."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.commands.loading import CommandError, OneLineParser, run_command
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAMES,
    CheckpointError,
    check_state_dict,
    read_json,
    read_weights,
    same_tensor,
)
from mamba_ssm.utils.checkpoint_format import (
    LM_HEAD,
    hf_to_mamba_ssm_config,
    hf_to_mamba_ssm_state_dict,
    to_mamba_ssm_config,
)
from mamba_ssm.utils.hf import TOKENIZER_FILES, load_state_dict_hf, save_pretrained_dir
from mamba_ssm.utils.hub import LocalFiles, ModelFiles, find_required, find_weights, open_model

PROG = "python -m mamba_ssm convert"
# What a transformers configuration says beyond the model, kept beside a mamba_ssm one.
EXTRAS_NAME = "transformers_config.json"
_COPIED = (*TOKENIZER_FILES, "vocab.txt", "chat_template.jinja", "generation_config.json")


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = OneLineParser(
        prog=prog,
        description="Convert a checkpoint between transformers' format and mamba_ssm's. Tensors "
        "keep their bits and dtypes; tokenizer and generation settings are copied.",
    )
    parser.add_argument("src", metavar="SRC", help="'embedded', a local directory or a hub name")
    parser.add_argument("dst", metavar="DST", help="the directory to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "mamba_ssm"),
        help="hf: transformers' MambaForCausalLM; mamba_ssm: this library and the historical one",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest weights file, such as 500MB; more become shards (default: 5GB)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is in DST"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; returns the exit code (2 for errors, with one line saying what to do)."""
    args = build_parser(prog).parse_args(argv)
    return run_command(prog, lambda: print(convert(**vars(args))))


def convert(
    src: str, dst: str, to: str, max_shard_size: int | str = "5GB", overwrite: bool = False
) -> str:
    """Write the checkpoint ``src`` into the directory ``dst`` in the format ``to``.

    The weights are read back and compared with the source, bit for bit, before this returns.

    Returns:
        One line about what was written.

    Raises:
        CommandError: ``dst`` is ``src``, or holds a checkpoint and ``overwrite`` is false.
        CheckpointError: ``src`` cannot be read, is no Mamba-1 language model, or has something
            that ``to`` cannot represent; nothing has been written. Or ``dst`` cannot be written.
    """
    files, target = open_model(src), Path(dst)
    config_path = find_required(files, CONFIG_NAME)
    _check_target(target, config_path.parent, overwrite)
    raw = read_json(config_path)
    config = to_mamba_ssm_config(raw, str(config_path))
    extras = _extras(raw, files, str(config_path))
    state = load_state_dict_hf(src)
    _check_model(config, state, src)
    save_pretrained_dir(
        state, config, target, to, max_shard_size, (extras or None) if to == "hf" else None
    )
    _copy_companions(files, target, raw, extras if to == "mamba_ssm" else {})
    _compare(state, target)
    total = sum(tensor.nbytes for tensor in _distinct(state).values())
    return (
        f"{files.name} -> {target} ({to}): {len(_distinct(state))} tensors, {total / 1e6:.1f} MB, "
        "read back and equal bit for bit"
    )


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise CommandError(f"DST is SRC ({source}): give another directory to write")
    if target.exists() and not target.is_dir():
        raise CommandError(f"DST is a file ({target}): give a directory to write")
    there = [name for name in (CONFIG_NAME, *WEIGHTS_NAMES) if (target / name).exists()]
    if there and not overwrite:
        raise CommandError(
            f"DST ({target}) holds a checkpoint already ({', '.join(there)}): give another "
            "directory, or --overwrite"
        )


def _extras(raw: Mapping[str, Any], files: ModelFiles, source: str) -> dict[str, Any]:
    """What a transformers configuration has beyond the model; kept through a round trip."""
    if "model_type" in raw:
        return hf_to_mamba_ssm_config(raw, source)[1]
    kept = files.find(EXTRAS_NAME)
    extras = {} if kept is None else read_json(kept)
    if "tokenizer_class" in raw:
        extras.setdefault("tokenizer_class", raw["tokenizer_class"])
    return extras


def _check_model(config: dict[str, Any], state: dict[str, Tensor], source: str) -> None:
    """Refuse weights that are not those of the model described, before anything is written."""
    try:
        shape = MambaConfig(**config)
        model = MambaLMHeadModel(shape, device="meta")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{source}: {CONFIG_NAME} describes no model: {error}") from error
    expected = {key: value.shape for key, value in model.state_dict().items()}
    check_state_dict(expected, state, source)


def _copy_companions(
    files: ModelFiles, target: Path, raw: Mapping[str, Any], extras: Mapping[str, Any]
) -> None:
    """Tokenizer and generation settings, and what the format written has no place for."""
    for name in _COPIED:
        path = files.find(name)
        if path is not None:
            shutil.copyfile(path, target / name)
    tokenizer = target / "tokenizer_config.json"
    if "tokenizer_class" in raw and not tokenizer.exists():
        _write_json(tokenizer, {"tokenizer_class": raw["tokenizer_class"]})
    if extras:
        _write_json(target / EXTRAS_NAME, extras)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of tensors that another name has already."""
    return {key: t for key, t in state.items() if key != LM_HEAD or not _is_tied(state)}


def _is_tied(state: Mapping[str, Tensor]) -> bool:
    return any(state[LM_HEAD] is tensor for key, tensor in state.items() if key != LM_HEAD)


def _compare(state: Mapping[str, Tensor], target: Path) -> None:
    left = _distinct(state)
    for key, tensor in hf_to_mamba_ssm_state_dict(
        dict(read_weights(find_weights(LocalFiles(target))))
    ).items():
        if key not in left or not same_tensor(left.pop(key), tensor):
            raise CheckpointError(f"{target}: {key} did not come back as it was written")
    if left:
        raise CheckpointError(f"{target}: these tensors did not come back: {', '.join(left)}")
