"""Pairs of a prompt and a target from jsonl, tsv or parquet files, and their token ids."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "target")


def read_pairs(path: str | Path, limit: int | None = None, columns: tuple[str, str] = COLUMNS) -> Any:
    """A `datasets.Dataset` of the columns prompt and target, and teacher_prompt where the file has it.

    Args:
        path: .jsonl, .tsv (two columns, with or without a header of their names) or .parquet; .gz of the first two.
        limit: the first so many pairs alone.
        columns: the names of prompt and target in the file.

    Raises:
        ValueError: an unknown kind of file, a missing column, no pairs. OSError: the file cannot be read.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if kind == "tsv":
        rows = Dataset.from_list(_read_tsv(path, columns))
    elif kind in ("jsonl", "json"):
        try:
            rows = Dataset.from_json(str(path))
        except DatasetGenerationError as error:
            raise ValueError(f"{path} is no JSON with a pair a line: {error.__cause__ or error}") from error
    elif kind == "parquet":
        rows = Dataset.from_parquet(str(path))
    else:
        raise ValueError(f"{path} must be .jsonl, .tsv or .parquet, not .{kind}")
    if not len(rows):
        raise ValueError(f"{path} has no pairs")
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(rows.column_names)}")
    rows = rows.rename_columns({a: b for a, b in zip(columns, COLUMNS, strict=True) if a != b})
    rows = rows.select_columns([n for n in (*COLUMNS, "teacher_prompt") if n in rows.column_names])
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def _read_tsv(path: Path, columns: tuple[str, str]) -> list[dict[str, str]]:
    pairs = []
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != 2:
                raise ValueError(f"{path}, line {number}: two columns were expected, not {len(cells)}")
            if number > 1 or tuple(cells) != columns:
                pairs.append(dict(zip(columns, cells, strict=True)))
    return pairs


def tokenize(rows: Any, tokenizer: Any, config: Any, max_target: int) -> Any:
    """Columns prompt_ids, labels (end token included, at most `max_target`), teacher_prompt_ids, and length, of both.

    Raises:
        ValueError: a prompt is longer than the context of the model of that configuration.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    encoder_decoder, end = config.is_encoder_decoder, tokenizer.eos_token_id
    room = context if encoder_decoder or context is None else context - max_target

    if end is None:
        raise ValueError("the tokenizer has no end token")

    def open_ids(**text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around, but for the end token."""
        found = tokenizer(**text)["input_ids"]
        return found[:-1] if found and found[-1] == end else found

    def encode(row: dict[str, str], index: int) -> dict[str, Any]:
        for name in ("prompt", "target"):
            if not isinstance(row[name], str):
                raise ValueError(f"pair {index}: {name} must be text, not {row[name]!r}")
        prompts = {"prompt_ids": row["prompt"]}
        if "teacher_prompt" in row:
            prompts["teacher_prompt_ids"] = row["teacher_prompt"] or row["prompt"]
        made = {name: open_ids(text=text) + [end] * encoder_decoder for name, text in prompts.items()}
        for name, found in made.items():
            if room is not None and len(found) > room:
                raise ValueError(f"pair {index}: {name} has {len(found)} tokens, the model has room for {room}")
            if not found:
                raise ValueError(f"pair {index}: the prompt is empty")
        if encoder_decoder:
            target = open_ids(text_target=row["target"])
        else:  # it goes on from the prompt
            target = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        labels = [*target[: max_target - 1], end]
        return {**made, "labels": labels, "length": len(made["prompt_ids"]) + len(labels)}

    return rows.map(encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False,
                    desc="tokenizing")  # fmt: skip
