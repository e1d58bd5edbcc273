"""Models and tokenizers small enough to make in a test, offline."""

from __future__ import annotations

import random
from typing import Any

import torch


def cached(cache: Any) -> dict[str, Any]:
    """A cache under the name that the installed transformers has for it."""
    import transformers

    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    return {"cache" if version >= (5, 24) else "past_key_values": cache}


def tokenizer() -> Any:
    """A byte-level BPE of nothing but bytes, with a beginning of sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def llama(layers: int = 2, kv_heads: int = 2, **config: Any) -> Any:
    """A Llama with random weights, over that tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 258}
    fields |= {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "max_position_embeddings": 4096}
    fields |= {"bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.3}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(fields | config))).eval()


def text(words: int = 6000) -> str:
    """Paragraphs of random words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    drawn = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(words)]
    return "\n\n".join(" ".join(drawn[i : i + 20]) for i in range(0, words, 20))
