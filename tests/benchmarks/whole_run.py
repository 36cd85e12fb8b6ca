"""Measures the whole run, images to pushed model, against a tutorial-style TFX pipeline, paired in one run.

    make bench                                        # ELPV, one pair: about half an hour on two cores
    python tests/benchmarks/whole_run.py --data photos/ --repeats 3

Both start from the same prepared records, in fresh processes, and take the same number of epochs. The tutorial pipeline runs
twice a round: as TensorFlow comes, and with the oneDNN kernels that this project switches on. Prints seconds and the ratios of
the medians; the cached run is this project's second run with nothing changed, beside the imports alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = "import pipeline.config, pipeline.pipeline, pipeline.results, pipeline.report"


def _seconds(command: list[str], *, log: Path, one_dnn: bool | None = None) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
    if one_dnn is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = str(int(one_dnn))
    started = time.monotonic()
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - started


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description="Measures the whole run against a tutorial-style TFX pipeline.")
    parser.add_argument("--data", default="elpv", help="what local_runner.py takes as --data")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the medians are compared")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {}

    def measure(name: str, command: list[str], **options) -> None:
        seconds = _seconds(command, log=folder / "log", **options)
        times.setdefault(name, []).append(seconds)
        print(f"{name:<34} {seconds:7.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = folder / "records"
        prepare = [sys.executable, "-m", "data.prepare", "--input", arguments.data, "--output", str(records)]
        measure("preparation (not in the ratio)", prepare)
        for repeat in range(arguments.repeats):
            workspace = folder / f"ours-{repeat}"
            ours = [sys.executable, "local_runner.py", "--data", str(records), "--workspace", str(workspace)]
            ours += ["--set", f"training.epochs={arguments.epochs}"]
            measure("this project", ours)
            measure("this project, cached", ours)
            measure("imports alone", [sys.executable, "-c", _IMPORTS])
            for label, one_dnn in (("tutorial", None), ("tutorial with oneDNN", True)):
                tutorial = [sys.executable, str(Path(__file__).with_name("tutorial_pipeline.py"))]
                tutorial += ["--records", str(records), "--workspace", str(folder / f"{label}-{repeat}")]
                measure(label, [*tutorial, "--epochs", str(arguments.epochs)], one_dnn=one_dnn)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for label in ("tutorial", "tutorial with oneDNN"):
        print(f"ratio to {label}: {medians['this project'] / medians[label]:.3f}")
    print(f"cached run to its imports: {medians['this project, cached'] / medians['imports alone']:.2f}")


if __name__ == "__main__":
    main()
