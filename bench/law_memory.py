#!/usr/bin/python3
"""PyTorch's peak memory for a batch of law steps on the CPU, to hold `inference-core law plan` against.

The network and the step are those of law_torch.py (eager, float32, inference_mode). Printed: the largest resident memory
of three steps, less what the process held once the library had run something small. A case is its own process.

  law_memory.py [--d N] [--b N] [--case GRID,BATCH]...
"""
import argparse
import subprocess
import sys

import torch

from law_torch import Net, step


def status(key):
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))  # KiB


def run(d, b, grid, batch):
    with torch.inference_mode():
        step(Net(d, 4).eval(), torch.zeros(1, 8, 8, d, dtype=torch.complex64))
        before = status("VmRSS")
        net, psi = Net(d, b).eval(), torch.randn(batch, grid, grid, d, dtype=torch.complex64)
        for _ in range(3):
            psi = step(net, psi)
    print(f"d {d} b {b} grid {grid} batch {batch}: {(status('VmHWM') - before) / 1024:.1f} MiB", flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--d", type=int, default=2)
    p.add_argument("--b", type=int, default=32)
    p.add_argument("--case", action="append", default=[])
    p.add_argument("--alone", action="store_true")
    o = p.parse_args()
    for case in o.case or ["64,16", "128,16", "256,1", "256,4"]:
        if o.alone:
            run(o.d, o.b, *map(int, case.split(",")))
        else:
            subprocess.run([sys.executable, __file__, "--alone", "--d", str(o.d), "--b", str(o.b), "--case", case], check=True)


if __name__ == "__main__":
    main()
