"""llama.cpp as a peer: our weights written as GGUF, decoded through llama-cpp-python's C interface.

The file holds what llama.cpp's own conversion of a Mamba checkpoint holds, without a tokenizer:
token ids go in, logits come out. Matrices have the asked type; vectors, A, D and the convolution
stay fp32, and a matrix whose rows do not fill whole q8_0 blocks becomes f16, as there.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIP = "pip install llama-cpp-python gguf"
_LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_MATRICES = (
    "ssm_in.weight",
    "ssm_x.weight",
    "ssm_dt.weight",
    "ssm_out.weight",
    "token_embd.weight",
)


def _gguf_name(name: str) -> str:
    if name == "backbone.embedding.weight":
        return "token_embd.weight"
    if name == "backbone.norm_f.weight":
        return "output_norm.weight"
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[rest]}"


def write_gguf(model: torch.nn.Module, path: Path, kind: str) -> Path:
    """Write a MambaLMHeadModel's weights as a GGUF file.

    Args:
        model: an fp32 model of Mamba layers with RMSNorm and tied embeddings.
        path: where to.
        kind: the matrices' type, "f32", "bf16", "f16" or "q8_0".
    """
    import gguf

    types = gguf.GGMLQuantizationType
    wanted = types[kind.upper()]
    mixer, config = model.backbone.layers[0].mixer, model.config
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.dt_rank)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_file_type(
        gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"]
    )
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.lm_head.out_features)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        gguf_name = _gguf_name(name)
        data = tensor.detach().float().squeeze()
        if name.endswith("A_log"):
            data = -torch.exp(data)
        array = np.ascontiguousarray(data.numpy())
        type_ = types.F32
        if gguf_name.split(".", 2)[-1] in _MATRICES or gguf_name in _MATRICES:
            type_ = types.F16 if wanted == types.Q8_0 and array.shape[-1] % 32 else wanted
        if type_ != types.F32:
            array = gguf.quants.quantize(array, type_)
        writer.add_tensor(gguf_name, array, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def has_amx() -> bool:
    """Whether this processor has AMX, as Linux tells it."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_kept: list[Any] = []


class LlamaModel:
    """A loaded GGUF file; contexts for given numbers of sequences are made on demand.

    On a processor with AMX llama.cpp (0.3.36 of its Python package) lays q8_0 weights out for tiles
    and crashes at a Mamba model's first step; quantised files are loaded without that there.
    """

    def __init__(self, path: Path, threads: int, vocab: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp.llama_cpp
        if not _kept:
            # The library keeps the pointer for good, so it must outlive every model.
            _kept.append(self._api.llama_log_callback(lambda level, text, data: None))
        self._api.llama_log_set(_kept[0], ctypes.c_void_p(0))
        self._api.llama_backend_init()
        params = self._api.llama_model_default_params()
        params.use_extra_bufts = not (has_amx() and "q8_0" in path.name)
        self._model = self._api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._threads, self._vocab = threads, vocab
        self._contexts: dict[int, Any] = {}

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            params = self._api.llama_context_default_params()
            params.n_ctx = 2**14 * sequences  # a recurrent model's memory does not depend on it
            params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, sequences
            params.n_threads = params.n_threads_batch = self._threads
            context = self._api.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError("llama.cpp cannot make a context")
            batch = self._api.llama_batch_init(2048, 0, 1)
            self._contexts[sequences] = context, batch
        return self._contexts[sequences]

    def reset(self, sequences: int = 1) -> None:
        """Forget what the context for so many sequences has consumed."""
        context, _ = self._context(sequences)
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)

    def prefill(self, ids: Tensor) -> None:
        """Consume one prompt (1, length) from the start; logits of its last token."""
        self.reset()
        tokens = ids.flatten().tolist()
        for start in range(0, len(tokens), 2048):
            part = tokens[start : start + 2048]
            self._decode(1, part, [0] * len(part), range(start, start + len(part)))

    def step(self, tokens: list[int], position: int) -> None:
        """Consume one token for each of len(tokens) sequences; logits of each."""
        n = len(tokens)
        self._decode(n, tokens, list(range(n)), [position] * n, every=True)

    def _decode(self, sequences, tokens, owners, positions, every: bool = False) -> None:
        context, batch = self._context(sequences)
        batch.n_tokens = len(tokens)
        for i, (token, owner, position) in enumerate(zip(tokens, owners, positions, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = owner
            batch.logits[i] = every or i == len(tokens) - 1
        status = self._api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        # Forces the end of the computation, as a caller who samples does.
        self._api.llama_get_logits_ith(context, -1)

    def logits(self, sequences: int = 1) -> Tensor:
        """The last token's logits, (vocabulary,) fp32, a copy."""
        context, _ = self._context(sequences)
        pointer = self._api.llama_get_logits_ith(context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self._vocab,)).copy())

    def close(self) -> None:
        """Free the contexts and the model."""
        for context, batch in self._contexts.values():
            self._api.llama_batch_free(batch)
            self._api.llama_free(context)
        self._contexts.clear()
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None


def why_absent(errors: Mapping[str, str] | None = None) -> str | None:
    """None if llama.cpp can be used here, else what to type."""
    try:
        # Its import prints nothing of interest when a library does not load.
        with contextlib.redirect_stderr(None):
            import gguf  # noqa: F401
            import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"not installed: {PIP} ({error})"
    return None
