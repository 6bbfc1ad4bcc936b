"""Loads models, and names what is damaged or missing in their files."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.integrations import deepspeed

from .ranks import rank

#: What to do about a model's damaged file.
ANEW = "get it anew, or, if a run made its folder, remove that, and the run's command makes it anew"

#: What `from_pretrained` calls the dtype.
DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; ValueError, with the file and what to do, where it has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): {remedy}")
    return found


def _opens(path: Path) -> bool:
    """Whether a file of weights or of a trainer's state can be opened; others can."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except Exception:  # safetensors has its own
            return False
    of_torch = path.suffix in (".pt", ".pth") or path.match("pytorch_model*.bin") or path.match("adapter_model.bin")
    if not of_torch or zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO  # as torch.save wrote before 1.6


@contextlib.contextmanager
def names_damage(folder: str | Path, remedy: str) -> Iterator[None]:
    """Whatever fails inside because a file of a folder is damaged is a ValueError with that file and what to do."""
    try:
        yield
    except ValueError:  # of what was asked for
        raise
    except Exception as error:  # each library has its own for it
        here = Path(folder)
        found = next((path for path in sorted(here.glob("*")) if path.is_file() and not _opens(path)), None)
        if found is None and (here.exists() or not isinstance(error, SafetensorError)):
            raise
        why = str(error).partition(". ")[0]  # torch's goes on about what to report
        raise ValueError(f"{found or folder} is damaged ({why}): {remedy}") from error


def base_of(path: str | Path) -> str | None:
    """The base model that an adapter's folder names; None: it is no folder of an adapter."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.exists():
        return None
    base = read_json(adapter, ANEW).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} names no base_model_name_or_path")
    return str(base)


def load_config(path: str | Path, **options: Any) -> Any:
    """A model's configuration, or that of a PEFT adapter's base model. options: as in `load_model`."""
    base = base_of(path)
    try:
        with names_damage(base or path, ANEW):
            return AutoConfig.from_pretrained(base or path, **options)
    except (OSError, ValueError) as error:
        if (Path(path) / "student" / "config.json").exists():
            raise ValueError(f"{path} is a run's folder and no model's: give {Path(path) / 'student'}") from error
        if Path(base or path).exists():
            raise
        sought = f"{base} (the base model of {path})" if base else path
        words = str(error).splitlines()[0]
        raise ValueError(f"there is no folder {sought}, and the hub gives no such model: {words}") from error


def load_model(path: str | Path, split: int = 1, **options: Any) -> Any:
    """A causal or encoder–decoder model; ValueError where there is none, or a file is damaged or lacks weights.

    split: number of ranks that share each layer and the head (tensor parallelism, by the model's own plan); such groups
    share the rest by FSDP2. options: of `from_pretrained`; the dtype is by default that of the files.
    """
    options = {DTYPE: "auto", **options}  # transformers before 5 would make float32 of it, another model by fingerprint
    with names_damage(base_of(path) or path, ANEW), names_damage(path, ANEW):
        config = load_config(path, **{k: options[k] for k in ("revision", "trust_remote_code") if k in options})
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if base := base_of(path):
            from peft import PeftConfig, PeftModel

            of_adapter = PeftConfig.from_pretrained(str(path))
            if of_adapter.is_prompt_learning:  # transformers puts no virtual tokens into a model
                return PeftModel.from_pretrained(_whole(kind, base, **options), str(path))
        return _whole(kind, path, **options) if split == 1 else _split(kind, path, split, **options)


def _split(kind: Any, path: str | Path, split: int, **options: Any) -> Any:
    """A model each of whose layers is shared by so many ranks."""
    ranks = rank()[1]
    if ranks % split:
        raise ValueError(f"{ranks} ranks are no multiple of the {split} that share a layer")
    try:
        from transformers.distributed import DistributedConfig

        sizes = DistributedConfig(tp_size=split, fsdp_size=ranks // split)
    except (ImportError, TypeError) as error:
        raise ValueError("this version of transformers does not split models as it loads them") from error
    return kind.from_pretrained(path, distributed_config=sizes, **options)


@contextlib.contextmanager
def whole_on_each_rank() -> Iterator[None]:
    """Has transformers make models whole inside. Once ZeRO-3 is configured it leaves each rank a part, which only an
    engine gathers: a student gets one when it is trained, and a teacher never.
    """
    configured = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if configured is not None:
            deepspeed.set_hf_deepspeed_config(configured)


def _whole(kind: Any, path: str | Path, **options: Any) -> Any:
    """A model all of whose trainable weights are in its files: transformers makes up others, such as a missing head."""
    try:
        with whole_on_each_rank():
            model, told = kind.from_pretrained(path, output_loading_info=True, **options)
    except RuntimeError as error:  # of a card that some ways to quantise need
        if "quantization_config" not in options:
            raise
        raise ValueError(f"{path} cannot be quantised here: {error}") from error
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(trained & set(told["missing_keys"])):
        raise ValueError(f"{path} has no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} of "
                         f"{type(model).__name__}, which would be random")  # fmt: skip
    return model


def load_alike(model: Any, path: str | Path) -> Any:
    """A model as another one from a folder, in the widest dtype that this has, at least float32."""
    dtypes = {x.dtype for x in model.state_dict().values() if x.is_floating_point()}
    widest = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return _whole(type(model), path, config=copy.deepcopy(model.config), **{DTYPE: widest})


def load_student(path: str | Path, split: int = 1, **options: Any) -> Any:
    """A model to be trained, as `load_model`; of an adapter's folder its base, with the adapter to be trained on."""
    base = base_of(path)
    if base is None:
        return load_model(path, split, **options)
    if split > 1:
        raise ValueError(f"--tensor_parallel splits whole weights as they are loaded, and {path} is an adapter: merge "
                         "it into its base model first")  # fmt: skip
    from peft import PeftModel

    with names_damage(path, ANEW):
        return PeftModel.from_pretrained(load_model(base, **options), path, is_trainable=True)
