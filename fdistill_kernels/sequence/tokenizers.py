"""Tokenizers: loading one, and whether two are the same."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import AutoTokenizer

from ..teachers import Endpoint
from .hashes import tokenizer_hash


def ids_of_tokenizer(tokenizer: Any) -> int:
    """One more than a tokenizer's largest id, which is more than its length where it leaves ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def check_ids(tokenizer: Any, whose: str, most: int) -> None:
    """Raises ValueError for a tokenizer that has more ids than its model, of which these are all. whose: the model."""
    if (size := ids_of_tokenizer(tokenizer)) > most:
        raise ValueError(f"the {whose}'s tokenizer has {size} ids, the {whose} {most}: it is another model's, or has "
                         "tokens for which the model's embedding was not resized")  # fmt: skip


def load_tokenizer(path: Any, **options: Any) -> Any:
    """The tokenizer of a folder or hub name; transformers 5 makes one of special tokens alone, where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no tokenizer that can be loaded ({str(error).splitlines()[0]})") from error
    if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) <= {"▁"}:  # SentencePiece's space, of T5's
        raise ValueError(f"{path} has no tokenizer that can be loaded (but one of special tokens alone)")
    return tokenizer


#: A text of many kinds of tokens, on which two tokenizers of one size hardly agree.
TEXT = "The quick brown fox: 0123456789 + Ünïcödé, привет, 你好!\n\tdef f(x): return {x}"


def check_tokenizer(endpoint: Endpoint, tokenizer: Any, of: str) -> None:
    """Raises ValueError where a server's tokenizer is not that of `of`: by its hash if the server tells it, else by a
    text's tokens. A server that tells neither is warned of.
    """
    known = endpoint.tokenizer
    same = None if known is None else known == tokenizer_hash(tokenizer)
    if known is None and (ids := endpoint.tokenized(TEXT)) is not None:
        same = ids == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if same is None:
        warnings.warn(f"{endpoint.url} tells nothing of its tokenizer, which must be that of {of}", stacklevel=2)
    elif not same:
        raise ValueError(f"{endpoint.url} has another tokenizer than {of}")


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Raises ValueError where two tokenizers share a token with two ids, or an id with two tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    tokens = {i: t for t, i in theirs.items()}
    differ = [t for t, i in ours.items() if theirs.get(t, i) != i or (t not in theirs and i in tokens)]
    if differ or not set(ours) & set(theirs):
        token = next(iter(differ or ours))
        i = ours[token]
        other = theirs.get(token, f"{tokens[i]!r} has that id" if i in tokens else "missing")
        raise ValueError(f"student and teacher have different tokenizers: {token!r} is {i} in one and {other} in the "
                         "other; step-wise losses need one vocabulary")  # fmt: skip
