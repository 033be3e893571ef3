"""Time and memory of the demo, and of `import quantguard`.

    python benchmarks/footprint.py
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from quantguard.core.file_io import write_text

HERE = Path(__file__).parent / "results"


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> None:
    imports = [(seconds("import torch"), seconds("import torch, quantguard")) for _ in range(7)]
    added = statistics.median(b - a for a, b in imports)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "quantguard", "demo", "--output", folder, "--quiet"],
                       check=True, stdout=subprocess.DEVNULL)
        demo = time.perf_counter() - begin
        report = json.loads((Path(folder) / "report.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    record = {
        "import_added_seconds": added, "import_pairs": imports, "demo_seconds": demo,
        "demo_peak_mib": peak, "python": platform.python_version(), "torch": version("torch"),
        "cores": os.cpu_count(), "machine": platform.machine(), "demo_report": report}
    print(f"import quantguard adds {added:.2f} s to import torch (median of 7 pairs)\n"
          f"demo: {demo:.0f} s, peak memory {peak:.0f} MiB, {os.cpu_count()} cores")
    HERE.mkdir(exist_ok=True)
    write_text(HERE / "footprint.json", json.dumps(record))


if __name__ == "__main__":
    main()
