"""Bitwise comparison of a run that is killed repeatedly with an undisturbed one.

    python benchmarks/survival.py [--kills 20] [--epochs 6]

The demo's CNN is hardened on digits in a separate process. That process gets SIGKILL at random
moments and is started again, until it has been killed --kills times; then it may finish. Its
weights are compared with those of an undisturbed run. State is saved every 0.2 seconds here, by
default every minute. Each moment is drawn between half of the time that a start takes to write its
first state, and the rest of the run divided by the remaining kills.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from quantguard.core.file_io import write_text

HERE = Path(__file__).parent / "results"
RUN = """
import sys, torch
import quantguard as qg
from quantguard.training import trainer
from quantguard.data.loader import load_data
from quantguard.cli.demo import small_cnn
torch.set_num_threads(1)
trainer._SAVE_EVERY = 0.2
torch.manual_seed(0)
model = small_cnn().eval()
loader = load_data("digits", "train", batch_size=64)
where, epochs, out = sys.argv[1:]
hardened = qg.harden(model, loader, qg.Threat(eps=0.1), dynamic=True,
                     recipe=qg.Recipe("pgd", lr=2e-3), epochs=int(epochs),
                     run_dir=where, seed=0, progress=False)
torch.save(hardened.state_dict(), out)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        def start(name: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", RUN, f"{folder}/{name}",
                                     str(args.epochs), f"{folder}/{name}.pt"])
        begin = time.monotonic()
        process = start("alone")
        while not list(Path(folder, "alone").rglob("training.pt")):
            time.sleep(0.05)
        ready = time.monotonic() - begin
        assert process.wait() == 0
        alone = time.monotonic() - begin
        begin, moments = time.monotonic(), []
        while len(moments) < args.kills:
            process = start("killed")
            moment = ready * draw.uniform(0.5, 1.1) + \
                draw.uniform(0, 1.5) * (alone - ready) / (args.kills + 1)
            try:
                code = process.wait(moment)
                raise SystemExit(f"it ended with {code} after {len(moments)} kills: use more "
                                 "--epochs")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                moments.append(moment)
                left = sorted(p.name for p in Path(folder, "killed").rglob("*") if p.is_file()) \
                    if Path(folder, "killed").exists() else []
                print(f"killed after {moment:5.1f} s; there is {', '.join(left) or 'nothing'}",
                      flush=True)
        assert start("killed").wait() == 0
        disturbed = time.monotonic() - begin
        one, two = (torch.load(f"{folder}/{name}.pt", weights_only=True)
                    for name in ("alone", "killed"))
        same = all(torch.equal(v, two[k]) for k, v in one.items())
        lines = [Path(p).read_text() for p in sorted(Path(folder).rglob("metrics.jsonl"))]
        rows = [[{k: v for k, v in json.loads(row).items() if k != "seconds"}
                 for row in text.splitlines()] for text in lines]
    half = len(rows) // 2
    same_metrics = rows[:half] == rows[half:]
    print(f"undisturbed {alone:.0f} s; killed {len(moments)} times {disturbed:.0f} s; weights "
          f"{'identical' if same else 'DIFFERENT'}, metrics "
          f"{'identical' if same_metrics else 'DIFFERENT'}")
    write_text(HERE / "survival.json", json.dumps({
        "kills": moments, "alone": alone, "disturbed": disturbed, "identical": same,
        "metrics": same_metrics, "epochs": args.epochs, "seed": args.seed,
        "python": platform.python_version(), "torch": version("torch"),
        "machine": platform.machine()}))
    sys.exit(not (same and same_metrics))


if __name__ == "__main__":
    main()
