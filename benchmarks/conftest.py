"""What every result file says besides its timings."""

import torch


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps device, versions, commit and command; leaves out the host's name, its folder and the CPU's flags."""
    cpu = output_json["machine_info"]["cpu"]
    output_json["machine_info"] = {
        "cpu": cpu.get("brand_raw"),
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": output_json["machine_info"]["python_version"], "torch": torch.__version__,
    }  # fmt: skip
    for folder in ("project", "branch"):
        output_json["commit_info"].pop(folder, None)
    output_json["command"] = "make bench"
    for benchmark in output_json["benchmarks"]:
        benchmark.pop("options")
        benchmark["stats"].pop("data", None)
