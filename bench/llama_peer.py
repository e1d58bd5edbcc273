"""llama.cpp's decoding of the same model, by its Python binding (`pip install llama-cpp-python`)."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lserve_ext import models


def in_float32(source: Path, target: Path) -> None:
    """Writes a GGUF file again with float32 weights, which is what transformers makes of it."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, arch)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, of = entry.types[0], entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, of)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


@functools.cache
def quiet(lib: Any) -> Any:
    """A logger that says nothing, kept for as long as the library may call it."""
    return lib.llama_log_callback(lambda level, text, data: None)


def free(lib: Any, context: Any, model: Any) -> None:
    lib.llama_free(context)
    lib.llama_model_free(model)


class LlamaCpp:
    """A context of llama.cpp, which keeps its own KV cache.

    Args:
        tokens: room for so many.
        chunk: new tokens at a time, at most.
        kv: "f16" or "q8_0", the dtype of keys and values.
        threads: as torch has.

    Raises:
        ImportError: llama-cpp-python or gguf is not installed.
    """

    def __init__(self, tokens: int, chunk: int, kv: str, threads: int) -> None:
        import llama_cpp

        self.lib, self.held, self.kv = llama_cpp, 0, kv
        llama_cpp.llama_log_set(quiet(llama_cpp), None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            in_float32(models.smollm2_path(), path)
            given = llama_cpp.llama_model_default_params()
            given.use_mmap = False  # the file is removed at once
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), given)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = tokens, chunk, chunk
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.type_k = options.type_v = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[kv]
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp made no context for {tokens} tokens of {kv}")
        weakref.finalize(self, free, llama_cpp, self.context, self.model)

    def read_bytes(self) -> int:
        """Keys and values that are held."""
        lib, model = self.lib, self.model
        row = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model) * lib.llama_model_n_head_kv(model)
        size = 2 if self.kv == "f16" else 34 / 32  # q8_0: 32 codes and a scale of 2 bytes
        return int(2 * row * size * lib.llama_model_n_layer(model) * self.held)

    def step(self, ids: Tensor) -> Tensor:
        """Logits [vocabulary] of the last of new tokens, ids [1, n]."""
        tokens = np.ascontiguousarray(ids[0].numpy(), np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(self.lib.llama_token))
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(pointer, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode: {code}")
        self.held += len(tokens)
        count = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        return torch.from_numpy(np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (count,)))
