"""Rows of a file or a hub dataset, with prompts and targets as text or messages."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

COLUMNS = ("prompt", "target")
#: Other columns that rows may have.
OTHERS = ("teacher_prompt", "messages", "tools", "text")
#: Bytes of a table's row at most.
LONGEST_ROW = 2**26


def read_pairs(path: str | Path, limit: int | None = None, columns: tuple[str, str] = COLUMNS,
               config: str | None = None, split: str = "train") -> Any:  # fmt: skip
    """A `datasets.Dataset` with the columns prompt and target, or only prompt, messages or text, and `OTHERS`.

    Args:
        path: a .jsonl, .json, .csv or .tsv file (.tsv: two columns, without a header or with two of the names here),
            also as .gz, or a .parquet file; or the name of a hub dataset, with its config and split.
        limit: read only the first rows, this many.
        columns: names of the prompt and target columns in the file; a column completion also counts as target.

    Raises:
        ValueError: an unknown kind of file, a line that cannot be read, a missing column, no rows. OSError: no file.
    """
    if columns[0] == columns[1]:
        raise ValueError(f"prompt_column and target_column are both {columns[0]}: a row has one of each")
    rows = columns_read(_load(str(path), columns, config, split), path, columns)
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def columns_read(rows: Any, name: str | Path, columns: tuple[str, str] = COLUMNS) -> Any:
    """A dataset's columns as `read_pairs` returns them. name: of the data, for error messages."""
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    has = rows.column_names
    target = "completion" if columns[1] not in has and columns[1] == COLUMNS[1] else columns[1]
    wanted = next(
        (w for w in ((columns[0], target), ("messages",), (columns[0],), ("text",)) if set(w) <= set(has)), ()
    )
    named = [name for name, usual in zip(columns, COLUMNS, strict=True) if name != usual and name not in has]
    if named or not wanted:
        lacking = repr(named[0]) if named else f"{columns[0]!r}, and messages and text"
        raise ValueError(f"{name} lacks the column {lacking}; it has {', '.join(has)}")
    kept = [n for n in dict.fromkeys((*wanted, "teacher_prompt", "tools")) if n in has]
    rows = rows.select_columns(kept)
    names = dict(zip((columns[0], target), COLUMNS, strict=True))
    return rows.rename_columns({a: b for a, b in names.items() if a in kept and a != b})


def _load(path: str, columns: tuple[str, str], config: str | None, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = Path(path).name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("jsonl", "json", "csv", "tsv", "parquet"):
        if Path(path).is_file():
            raise ValueError(f"{path} must be .jsonl, .json, .csv, .tsv or .parquet, not .{kind}")
        if any(Path(path, name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(f"{path} was written by save_to_disk, which load_from_disk alone reads: write its rows by "
                             "to_parquet")  # fmt: skip
        try:
            with _rows_are_kept():
                return load_dataset(path, config, split=split)
        except DatasetGenerationError as error:  # of a folder or a hub dataset whose files do not fit together, say
            raise ValueError(f"{path}: {error.__cause__ or error}") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read(path, kind, columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as gzip: {error}") from error


def _read(path: str, kind: str, columns: tuple[str, str]) -> Any:
    from datasets import Dataset, concatenate_datasets, load_dataset
    from datasets.exceptions import DatasetGenerationError

    with _open(path, "rb") as file:
        begin = file.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip(b"[ \t\r\n")
    if begin.rstrip() in (b"", b"]"):
        raise ValueError(f"{path} has no rows")
    if kind in ("json", "jsonl") and begin.startswith(b"null"):  # which ends arrow, and Python with it
        raise ValueError(f"{path} begins with null, which is no row")
    try:
        if kind in ("csv", "tsv"):
            return _read_table(path, "\t" if kind == "tsv" else ",", columns)
        changed = str(os.stat(path).st_ctime_ns)  # and keeps what it read by mtime, which a copy may have of another
        with _rows_are_kept():
            there = _plain_path(Path(path).absolute(), kind)
            found = load_dataset("parquet" if kind == "parquet" else "json", changed, data_files=there, split="train")
        read = {*columns, "completion", *OTHERS} if kind != "parquet" else ()
        dated = [name for name, of in found.features.items() if name in read and "timestamp" in str(of)]
        if not dated:
            return found
        # arrow takes text that is a date for the date
        as_text = Dataset.from_list([{name: row.get(name) for name in dated} for row in _objects(path)])
        return concatenate_datasets([found.remove_columns(dated), as_text], axis=1)
    except (ValueError, csv.Error, DatasetGenerationError) as error:
        raise ValueError(_culprit(path, kind) or f"{path}: {error.__cause__ or error}") from error


@contextlib.contextmanager
def _rows_are_kept() -> Iterator[None]:
    """Names the folder in which `datasets` keeps what it reads where that fails: a home may be read-only or full."""
    from datasets import config

    try:
        yield
    except OSError as error:
        folder, at = str(config.HF_DATASETS_CACHE), str(error.filename or "")
        if not (at and (folder.startswith(at) or at.startswith(folder))) and "disk space" not in str(error):
            raise
        raise OSError(f"datasets cannot keep the rows in {folder} ({error}): set HF_DATASETS_CACHE to a folder "
                      "that can be written") from error  # fmt: skip


def _plain_path(path: Path, kind: str) -> str:
    """The file's path, or a link to it where `datasets` would take its name for a pattern or a chain of addresses."""
    if not re.search(r"[*?\[\]]|::", str(path)):
        return str(path)
    from datasets import config

    links = Path(config.HF_DATASETS_CACHE, "links")  # always of one name, by which what was read before is found
    link = links / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.{kind}{'.gz' if path.suffix == '.gz' else ''}"
    links.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return str(link)


def _open(path: str, mode: str, **keywords: Any) -> Any:
    return (gzip.open if path.endswith(".gz") else open)(path, mode, **keywords)


def _objects(path: str) -> list[Any]:
    """The rows of a file of JSON: a list of them, or one value after another, each in a line if they are several."""
    with _open(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    try:
        found = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return found if isinstance(found, list) else [found]


def _culprit(path: str, kind: str) -> str | None:
    """The line that is not UTF-8 or not JSON, and why."""
    if kind == "parquet":
        return None
    with _open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode().strip()
                if kind == "json" and text.startswith("["):  # one value over many lines
                    kind = "array"
                if kind in ("json", "jsonl") and text:
                    json.loads(text)
            except ValueError as error:
                return f"{path}, line {number}: {error}"
    return None


def _read_table(path: str, separator: str, columns: tuple[str, str]) -> Any:
    """Reads every cell as text: what looks like a number or a null is a word."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import csv as arrow

    tabs = separator == "\t"
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark, which arrow skips
        first = file.readline().rstrip("\r\n").split("\t") if tabs else next(csv.reader(file))
    wanted = {*columns, "completion", *OTHERS}
    first = [name.strip() if name.strip() in wanted else name for name in first]  # "prompt, target"
    known = [name in wanted for name in first]
    if tabs and len(known) == 2 and sum(known) == 1:
        raise ValueError(f"it begins with {first}, of which one is the name of a column: begin it with two names, "
                         "or with none")  # fmt: skip
    header = not tabs or any(known)
    names = first if header else list(columns)
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name, among {', '.join(names)}")
    table = arrow.read_csv(
        path, arrow.ReadOptions(use_threads=False, column_names=names, skip_rows=int(header), block_size=LONGEST_ROW),
        arrow.ParseOptions(delimiter=separator, quote_char=False if tabs else '"', newlines_in_values=not tabs),
        arrow.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False),
    )  # fmt: skip
    return Dataset(table)
