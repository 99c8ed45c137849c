#!/usr/bin/env python3
"""UNET_UNITARY under PyTorch on a GPU: the baseline of bench/law_gpu.c, same arithmetic, same line format.

  law_gpu_torch.py [--d N] [--b N] [--eager [--tf32]] [--case GRID,BATCH]...

Compiled: torch.compile(mode="reduce-overhead") of the whole step, network in fp16 channels-last, psi complex64
outside, as Atheria would run it. Eager: float32 (TF32 off, or on in convolutions). Times are medians of 5 runs of many steps, device
events around each run.
"""
import argparse
import sys
import time

import torch

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from law_torch import GAMMA, Net  # noqa: E402


def make_step(net, half):
    def step(psi):  # [B, H, W, d, 2] float32
        x = torch.cat([psi[..., 0], psi[..., 1]], -1).permute(0, 3, 1, 2)
        if half:
            x = x.to(torch.float16, memory_format=torch.channels_last)
        y = net(x).permute(0, 2, 3, 1).float()
        d = psi.shape[-2]
        re, im, pr, pi = y[..., :d], y[..., d:], psi[..., 0], psi[..., 1]
        phi = torch.stack([pr + (re * pr - im * pi) - GAMMA * pr, pi + (re * pi + im * pr) - GAMMA * pi], -1)
        return phi / (phi.square().sum((-2, -1), keepdim=True).sqrt() + 1e-9)

    return step


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--d", type=int, default=8)
    p.add_argument("--b", type=int, default=32)
    p.add_argument("--eager", action="store_true")
    p.add_argument("--tf32", action="store_true")
    p.add_argument("--case", action="append", default=[])
    a = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, a.tf32
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(1)
    net = Net(a.d, a.b).eval().cuda().requires_grad_(False)
    if not a.eager:
        net = net.half().to(memory_format=torch.channels_last)
    name = ("torch-eager-tf32" if a.tf32 else "torch-eager-fp32") if a.eager else "torch-compile-fp16"
    for case in a.case:
        grid, batch = map(int, case.split(","))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = make_step(net, not a.eager)
        if not a.eager:
            step = torch.compile(step, mode="reduce-overhead", dynamic=False)
        psi = torch.randn(batch, grid, grid, a.d, 2, device="cuda")
        t0 = time.time()
        with torch.inference_mode():
            def run(n):
                nonlocal psi
                for _ in range(n):
                    if not a.eager:
                        torch.compiler.cudagraph_mark_step_begin()
                    out = step(psi)
                    psi.copy_(out)

            run(8)
            torch.cuda.synchronize()
            warm = time.time() - t0
            a0, a1 = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a0.record()
            run(20)
            a1.record()
            torch.cuda.synchronize()
            n = max(20, int(100 / (a0.elapsed_time(a1) / 20)))
            ms = []
            for _ in range(5):
                a0.record()
                run(n)
                a1.record()
                torch.cuda.synchronize()
                ms.append(a0.elapsed_time(a1) / n)
        ms.sort()
        flop = 2 * (232 * a.b**2 + 20 * a.b * a.d) * grid * grid * batch
        print(f"{name} d {a.d:2d} b {a.b:3d} grid {grid:3d} batch {batch:2d}  {ms[2]:8.4f} ms/step ({ms[0]:.4f}..{ms[4]:.4f})  "
              f"{flop / ms[2] / 1e6:8.1f} GFLOP/s  peak {torch.cuda.max_memory_allocated() / 2**20:.1f} MiB, "
              f"first steps {warm:.1f} s")
        print(f"RESULT {name} {a.d} {a.b} {grid} {batch} {ms[2]:.5f}", flush=True)


if __name__ == "__main__":
    main()
