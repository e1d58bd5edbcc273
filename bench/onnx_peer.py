"""ONNX Runtime's attention for decode, GroupQueryAttention, on keys and values that torch holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def decode(q: Tensor, k: Tensor, v: Tensor, int8: bool) -> tuple[Callable[[], object], Tensor]:
    """One query a sequence, whose token is the newest one.

    Args:
        q: [B, Hq, D] float32; k, v: [B, H, tokens, D].
        int8: hold keys and values in INT8, a scale a tensor, as its quantised KV cache does.

    Returns:
        What runs it, and [B, Hq, D] that it writes.

    Raises:
        ImportError: onnxruntime or onnx is not installed.
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    (B, Hq, D), (H, tokens) = q.shape, k.shape[1:3]
    scales = [x.abs().amax().float().view(1) / 127 for x in (k, v)]
    held = [x.contiguous() for x in (k, v)]
    if int8:
        held = [(x / scale).round().to(torch.int8) for x, scale in zip((k, v), scales, strict=True)]
    newest = [x[:, :, -1].reshape(B, 1, H * D).contiguous() for x in (k, v)]
    out = torch.empty(B, 1, Hq * D)
    inputs = {"q": q.reshape(B, 1, Hq * D), "k": newest[0], "v": newest[1], "past_k": held[0], "past_v": held[1]}
    inputs["last"], inputs["total"] = (torch.tensor(x, dtype=torch.int32) for x in ([tokens - 1] * B, [tokens]))
    options = {"num_heads": Hq, "kv_num_heads": H}
    names = [*inputs]
    if int8:
        inputs |= {"k_scale": scales[0], "v_scale": scales[1]}
        names += [""] * 5 + ["k_scale", "v_scale"]  # between them what is not used: rotary tables, positions, ...
        options |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    outputs = {"out": out, "present_k": held[0], "present_v": held[1]}  # the cache is written in place

    kinds = {torch.float32: TensorProto.FLOAT, torch.int8: TensorProto.INT8, torch.int32: TensorProto.INT32}
    described = [
        [helper.make_tensor_value_info(name, kinds[x.dtype], list(x.shape)) for name, x in group.items()]
        for group in (inputs, outputs)
    ]
    node = helper.make_node("GroupQueryAttention", names, [*outputs], domain="com.microsoft", **options)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "decode", *described), opset_imports=opsets, ir_version=9)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = torch.get_num_threads()
    session.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which would disturb what runs next
    runs = onnxruntime.InferenceSession(model.SerializeToString(), session, providers=["CPUExecutionProvider"])
    binding = runs.io_binding()
    types = {torch.float32: np.float32, torch.int8: np.int8, torch.int32: np.int32}
    for bind, group in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, x in group.items():
            bind(name, "cpu", 0, types[x.dtype], tuple(x.shape), x.data_ptr())
    kept = [*inputs.values(), *outputs.values()]  # their addresses are bound

    def call() -> object:
        runs.run_with_iobinding(binding)
        return kept

    return call, out.view(B, Hq, D)
