"""What every result file says besides its timings."""

import shlex

from fdistill_kernels.provenance import provenance


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps device, versions, commit and command; leaves out the host's name, its folder and the CPU's flags."""
    origin = provenance(f"python -m pytest {shlex.join(config.invocation_params.args)}")
    output_json["command"] = origin.pop("command")
    output_json["commit_info"] = {
        "id": origin.pop("commit"), "dirty": origin.pop("dirty"), "time": output_json["commit_info"].get("time")
    }  # fmt: skip
    output_json["machine_info"] = origin
    for benchmark in output_json["benchmarks"]:
        benchmark.pop("options")
        benchmark["stats"].pop("data", None)
