"""Tiny language models of random weights, as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (
    "<unk>", "<s>", "</s>", "The", "In", "the", "cat", "dog", "sea", "horse", "otter", "lynx", "lamp", "appears", "as",
    "a", "an", "in", "one", "sentence", ",", ".", "?", "red", "green", "blue", "small", "large", "round", "long", "fur",
    "tail", "ears", "with", "and", "describe", "what", "does", "look", "like", "which", "has", "violin", "steam",
)  # fmt: skip


def save_tokenizer(folder: Path, chat: str | None = None) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=chat
    )
    fast.save_pretrained(folder)


def save_model(folder: Path, kind: str = "Llama", chat: str | None = None, seed: int = 0, **more: Any) -> Path:
    """A model of random weights: 3 layers, 4 heads with 2 keys, width 32."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**(sizes | more))
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():  # norms too are none of 1, and nothing is nearly zero
            p += 0.2 * torch.randn(p.shape)
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(folder, chat)
    return folder
