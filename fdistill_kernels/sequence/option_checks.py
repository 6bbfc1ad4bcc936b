"""Options that are missing, too small, in conflict, or not used."""

from __future__ import annotations

import re
from pathlib import Path

from ..checks import check_number
from .loading import base_of
from .options import Asked
from .report import name_of
from .teachers.given import is_store, is_url

#: Smallest values of numbers that nothing else checks.
LEAST = {
    "limit": 1, "eval_pairs": 1, "max_target_tokens": 1, "predistill_steps": 0, "k": 1, "lora_r": 1, "lora_alpha": 1,
    "tensor_parallel": 1, "max_steps": 1, "head_rank": 1,
}  # fmt: skip
#: Folders that are made if they are not there.
OF_FOLDERS = {"output_dir", "samples", "student_server_path"}
#: Options of checkpoints.
SAVING = ("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end")


def check(asked: Asked) -> None:
    """Raises ValueError for options that are missing, too small, or in conflict."""
    _check_numbers(asked)
    if not asked.model.teacher:
        raise ValueError("--teacher is needed")
    if asked.run.vllm_url and not is_url(asked.run.vllm_url):
        raise ValueError(f"--vllm_url must begin with http:// or https://, not {asked.run.vllm_url!r}")
    _check_data(asked)
    _check_student(asked)
    for prefix in ("", "teacher_"):
        asked.model.options(prefix)
    if asked.model.chat_template_path is not None:
        asked.model.chat_template()
    made = asked.given if asked.command == "evaluate" else {**asked.training, **asked.given}
    for name in OF_FOLDERS:
        if made.get(name) == "":  # as of a variable that a shell has not: the folder where one is
            raise ValueError(f"--{name} is empty: name a folder, or leave it out")
        path = Path(made.get(name) or "").absolute()
        if not (there := next(p for p in (path, *path.parents) if p.exists())).is_dir():
            raise ValueError(f"--{name} {made[name]}: {there} is a file, and no folder")
    if asked.config.eval_strategy == "no" and asked.run.eval_measures:  # a configuration checks its own
        raise ValueError("--eval_measures measures at every evaluation, and --eval_strategy no leaves none")


def _check_numbers(asked: Asked) -> None:
    given = asked.given
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and value < least and not (name == "max_steps" and "num_train_epochs" in given):
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    check_number("--lora_dropout", asked.lora.lora_dropout, 0, 1)
    if (epochs := given.get("num_train_epochs")) is not None and epochs <= 0:
        raise ValueError(f"--num_train_epochs must be positive, not {epochs:g}")
    if epochs and (given.get("max_steps") or 0) > 0:
        raise ValueError("--max_steps and --num_train_epochs both say how long the run is: give one of them")
    warmup = given.get("warmup_steps") or 0
    for name in ("max_steps", "predistill_steps"):
        if 0 < (steps := given.get(name) or 0) < warmup:
            raise ValueError(f"--warmup_steps {warmup:g} are more than --{name} {steps}")


def _check_data(asked: Asked) -> None:
    if not (asked.data.data or (asked.command == "evaluate" and asked.data.eval_data)):
        raise ValueError("--data is needed")
    train, test = (path and not Path(path).is_file() for path in (asked.data.data, asked.data.eval_data))
    hub = {"dataset_config": train or test, "dataset_train_split": train, "dataset_test_split": test}
    for name, used in hub.items():
        if asked.given.get(name) and not used:
            raise ValueError(f"--{name} is of a hub dataset, and none is there to take it")


def _check_student(asked: Asked) -> None:
    model = asked.model
    if model.student and model.student_layers:
        raise ValueError("--student_layers makes a student, and --student names another: give one of them")
    if not re.fullmatch(r"\d+(,\d+)?", model.student_layers or "1"):
        raise ValueError(f"--student_layers must be as in 3,1 or 4, not {model.student_layers!r}")
    adapted = bool(model.student) and (Path(str(model.student)) / "adapter_config.json").exists()
    if asked.lora.use_peft and adapted:
        raise ValueError(f"--use_peft makes a new adapter, and {model.student} is one, which is trained on without it; "
                         "merge it into its base model for a new one")  # fmt: skip
    if lora := [f"--{n}" for n in asked.given if n != "use_peft" and n in vars(asked.lora)]:
        if not asked.lora.use_peft:
            raise ValueError(f"{', '.join(lora)}: of an adapter, which --use_peft asks for")
    elif model.quantization and asked.command != "evaluate" and not (asked.lora.use_peft or adapted):
        raise ValueError("--quantization leaves the student's weights as they are: train an adapter, --use_peft")
    if asked.run.tensor_parallel > 1 and asked.lora.use_dora:
        raise ValueError("--use_dora: an adapter of whole weights, which --tensor_parallel splits: leave one out")


def check_used(asked: Asked) -> None:
    """Raises ValueError for options that are given and that such a run makes nothing of."""
    if asked.command == "evaluate" and asked.data.data and asked.data.eval_data:
        raise ValueError("evaluate measures one file: give --data or --eval_data")
    sources, builds = asked.drawn(), asked.command == "teacher build"
    served, stored = is_url(asked.model.teacher), is_store(str(asked.model.teacher))
    if asked.command == "sample-teacher" and (stored or not sources):
        asks = f"{name_of(asked.config)} asks for no sequences of the teacher"
        raise ValueError(f"{'a store has its own samples' if stored else asks}: there is nothing to draw")
    drawing = {"samples", "vllm_url", "online_teacher"}
    models = ("revision", asked.model.student), ("teacher_revision", asked.model.teacher)
    in_folders = {name for name, path in models if path and Path(base_of(path) or path).is_dir()}
    saving = {*SAVING} - ({"save_strategy"} if asked.given.get("save_strategy") == "no" else set())
    unused = (
        (stored, {*drawing, "k", "beams"}, "a store draws nothing and has its own samples and k"),
        (not (served or stored or builds), {"k", "tail"}, "the teacher's own weights need no lists"),
        (served or stored, {"teacher_dtype", "teacher_revision", "teacher_quantization", "device_map"},
         "the teacher's weights are not loaded"),
        (not (served or asked.run.vllm_url), {"served_model_name"}, "no server of the teacher is asked"),
        (not served, {"server_kind"}, "--teacher is no server's URL"),
        (not asked.model.student, {"revision", "quantization"}, "no --student is loaded"),
        (True, in_folders, "a model's folder has no revisions, which are the hub's"),
        (asked.run.online_teacher, {"samples", "vllm_url"}, "--online_teacher draws anew at every step"),
        (not sources and not builds, drawing - ({"samples"} if served else set()),
         "the objective is on no sequences that the teacher draws"),
        ("beam" in sources, {"vllm_url"}, "a server is asked for samples, not for beams"),
        ("beam" not in sources, {"beams"}, "no beams are asked for"),
        ("teacher" not in sources and builds, {"sample_temperature", "top_k", "top_p"}, "no samples are asked for"),
        (not sources and builds, {"cache_implementation"}, "nothing is drawn"),
        (not asked.config.push_to_hub, {"hub_model_id", "hub_private_repo", "hub_revision", "hub_token"},
         "nothing is pushed without --push_to_hub"),
        (True, {"bf16_full_eval", "fp16_full_eval"}, "evaluations while training are in its dtype"),
        (not asked.config.evaluates, {"per_device_eval_batch_size"},
         "--eval_strategy no leaves no evaluation"),
        (not asked.config.fsdp, {"fsdp_config"}, "--fsdp is not given"),
        (not asked.config.report_to, {"run_name", "project", *(n for n in asked.given if n.startswith("trackio_"))},
         "--report_to names nobody"),
        (asked.run.tensor_parallel > 1, saving, "a student that is split over ranks is saved at the end alone"),
        (asked.command == "sample-teacher", {"online_teacher"}, "samples that are kept are drawn once"),
        (asked.config.method == "predistill", {"predistill_steps"}, "the method is pre-distillation itself"),
    )  # fmt: skip
    for here, names, why in unused:
        if here and (found := sorted(n for n in names if asked.given.get(n))):
            raise ValueError(f"--{', --'.join(found)}: not used, as {why}")
