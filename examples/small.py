"""Chats, a tokenizer and models that need no download: what the examples have in the place of yours."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.sequence.data import tokenize

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of two questions and their answers, about numbers that follow each other."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        numbers = list(range(first := draw.randrange(1, 10), first + draw.randrange(2, 5)))
        said = [" ".join(map(str, order)) for order in (numbers, numbers[::-1])]
        turns = [f"Count from {numbers[0]} to {numbers[-1]}.", said[0], "And back?", said[1]]
        rows.append({"messages": [{"role": role, "content": text}
                                  for role, text in zip(("user", "assistant") * 2, turns, strict=True)]})  # fmt: skip
    return rows


def tokenizer() -> Any:
    """Of the chats, with a template."""
    bpe, special = ByteLevelBPETokenizer(), ["</s>", "<s>", "<|user|>", "<|assistant|>"]
    texts = [turn["content"] for row in chats(200) for turn in row["messages"]]
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", bos_token="<s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    return made


def llama(words: Any, layers: int, seed: int, width: int = 64) -> Any:
    """A model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fine_tuned(model: Any, words: Any, rows: Any, steps: int, rate: float = 3e-3) -> Any:
    """The model after some steps on the chats' answers, by its own loss without logits."""
    data = tokenize(rows, words, model.config)
    optimizer, collate = torch.optim.AdamW(model.parameters(), rate), DataCollatorForSeq2Seq(words)
    patch_model(model)
    for step in range(steps):
        batch = data.shuffle(seed=step).select(range(32))
        examples = [{"input_ids": row["prompt_ids"] + row["labels"], "labels": _answers(row)} for row in batch]
        model(**collate(examples)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _answers(row: dict[str, Any]) -> list[int]:
    counted = row.get("labels_mask") or [True] * len(row["labels"])
    return [-100] * len(row["prompt_ids"]) + [i if c else -100 for i, c in zip(row["labels"], counted, strict=True)]
