"""The teacher's samples, which are drawn once and kept.

`TeacherSamples` is a folder: manifest.json, with the key of everything that decides the samples, and Parquet shards of
SHARD prompts each, which are complete or absent. A killed run continues with the first missing shard. A different key
is an error that shows both values.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..teachers.files import Damaged, noticing, write_whole
from ..teachers.settings import check_same
from .generation import FORM, TOKENS
from .hashes import data_hash
from .loading import read_json
from .sampling import Sampling, draw

SHARD = 256
#: What a generation configuration says that `draw` says otherwise, or that decides nothing.
SAID = {"pad_token_id", "use_cache", "max_length", "transformers_version"}


def generation_settings(model: Any, sampling: Sampling) -> dict[str, Any]:
    """What a model's own generation configuration decides of `draw`'s sequences, where it is not the default, in JSON.

    Of beams that is all that neither `Sampling` nor `draw` says; of samples `TOKENS` and the end tokens alone.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    said = {*Sampling().keywords(), *Sampling(beams=2).keywords(), *FORM} | SAID
    found = {k: v for k, v in own.to_diff_dict().items()
             if k not in said and not k.startswith(("_", "output_")) and v is not None}  # fmt: skip
    if not sampling.beams:
        found = {k: v for k, v in found.items() if k in (*TOKENS, "eos_token_id")}
    return dict(json.loads(json.dumps(found, sort_keys=True, default=str)))


class TeacherSamples:
    """Continuations of prompts, kept in a folder."""

    def __init__(
        self, folder: str | Path, prompts: Sequence[Sequence[int]], sampling: Sampling, teacher: str, seed: int,
        settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        """Opens the folder or makes it; settings: the teacher's `generation_settings`."""
        if not len(prompts):
            raise ValueError("there are no prompts to sample for")
        self.folder, self.prompts, self.sampling, self.seed = Path(folder).absolute(), prompts, sampling, seed
        self.key = {"teacher": teacher, "data": data_hash(prompts), "prompts": len(prompts), "seed": seed,
                    **sampling.decided(), **(settings or {})}  # fmt: skip
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(manifest, json.dumps(self.key, indent=1).encode())
            return
        known = read_json(manifest, f"remove {self.folder} to sample anew")
        check_same(f"the samples in {self.folder} were drawn otherwise", known, self.key)

    @classmethod
    def kept(cls, folder: Path, prompts: Sequence[Sequence[int]], job: dict[str, Any]) -> TeacherSamples:
        """Those that a teacher drew who is not there any more, by whatever sampling. job: the store's, for a hint."""
        try:
            known = read_json(folder / "manifest.json", "build the store anew")
            sampling = Sampling(**{name: known[name] for name in Sampling().decided()})
        except (OSError, ValueError, KeyError) as error:
            told = ("data", "limit", "eval_data", "eval_pairs", "sequences")
            kind = folder.name.partition("-")[0].replace("_", " ")  # teacher samples, or teacher beams
            why = "" if isinstance(error, FileNotFoundError) else f" ({error})"
            raise ValueError(f"{folder.parent} holds no {kind} for these prompts{why}; it was built of "
                             + ", ".join(f"{n} {job[n]}" for n in told if n in job)) from error  # fmt: skip
        decided = {"data", "prompts", "seed", "teacher", *sampling.decided()}
        return cls(folder, prompts, sampling, known["teacher"], known["seed"],
                   {k: v for k, v in known.items() if k not in decided})  # fmt: skip

    def shards(self) -> list[Path]:
        """The paths of all shards, whether they exist or not."""
        return [self.folder / f"shard-{i:05d}.parquet" for i in range(-(-len(self.prompts) // SHARD))]

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        return [i for i, shard in enumerate(self.shards()) if not shard.exists()]

    def fill(
        self, source: Any, rank: int = 0, ranks: int = 1, *, batch: int = 32, vocabulary: int | None = None
    ) -> Iterator[int]:
        """Draws what is missing from a model or an `Endpoint`; yields the number of finished prompts after each batch.

        With several ranks, each draws its share of the shards. vocabulary: as in `draw`.
        """
        import pyarrow

        ask = source.draw if hasattr(source, "draw") else functools.partial(draw, source)
        for number in [n for n in self.missing() if n % ranks == rank]:
            made: list[list[int]] = []
            done = sum(len(self._range(i)) for i, shard in enumerate(self.shards()) if shard.exists())
            indices = self._range(number)
            for begin in range(0, len(indices), batch):
                some = indices[begin : begin + batch]
                prompts = [torch.as_tensor(self.prompts[i]) for i in some]
                seed = self.seed * 1_000_003 + some[0]
                made += [row.tolist() for row in ask(prompts, self.sampling, seed, vocabulary)]
                done += len(some)
                yield done
            table = pyarrow.table({"index": list(indices), "sample_ids": made})
            # pages have checksums of their own, what says how they are read has none
            write_table(table.replace_schema_metadata({"hash": data_hash(made)}), self.shards()[number])

    def _range(self, number: int) -> range:
        return range(number * SHARD, min((number + 1) * SHARD, len(self.prompts)))

    def load(self) -> list[list[int]]:
        """All continuations, in the order of the prompts."""
        if self.missing():
            raise ValueError(
                f"{len(self.missing())} of {len(self.shards())} shards in {self.folder} are missing: sample them first"
            )
        return [ids for number in range(len(self.shards())) for ids in self._shard(number)]

    def _shard(self, number: int) -> list[list[int]]:
        import pyarrow
        import pyarrow.parquet

        path, why = self.shards()[number], "it holds other prompts"
        try:
            with noticing():
                rows = pyarrow.parquet.read_table(path, page_checksum_verification=True)
            made = rows["sample_ids"].to_pylist()
            if (rows.schema.metadata or {}).get(b"hash") != data_hash(made).encode():
                why = "its samples have another hash"
            elif rows["index"].to_pylist() == list(self._range(number)):
                return made
        except (Damaged, KeyError, TypeError, pyarrow.ArrowException) as error:
            why = str(error)
        raise ValueError(f"{path} is not what was written ({why}): remove it, and its prompts are sampled anew")


def write_table(table: Any, path: str | Path) -> None:
    """Writes a `pyarrow.Table` as a Parquet file, completely or not at all."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    write_whole(Path(path), sink.getvalue().to_pybytes())
