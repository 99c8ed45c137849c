#!/usr/bin/python3
"""UNET_UNITARY under PyTorch eager float32 on the CPU: the baseline of bench/law.sh.

Needs Debian's python3-torch (hence /usr/bin/python3). Same weights and start as bench/law_cpu.c: reads what
`law-cpu-bench --dump FOLDER` wrote, first repeats its steps and prints the largest difference, then times
the same cases. Arithmetic: shared/law-m.md 1.2 and 2.2, as Atheria's CartesianEngine does it under
torch.inference_mode (permutes, complex product, norm over channels).

  law_torch.py --dump FOLDER [--threads N] [--d N] [--b N] [--repeat N] [--case GRID,BATCH]...
"""
import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

DUMP_STEPS = 3  # as in law_cpu.c
GAMMA = 0.01


def groups(c):
    g = c // 8 if c > 8 else 1
    return g if c % g == 0 else 1


def block(cin, cout):
    def half(i):
        return [nn.Conv2d(i, cout, 3, padding=1, bias=False), nn.GroupNorm(groups(cout), cout), nn.ELU(inplace=True)]

    return nn.Sequential(*half(cin), *half(cout))


class Net(nn.Module):
    """Modules in state_dict order: the dump is one stream of floats in that order."""

    def __init__(self, d, b):
        super().__init__()
        self.inc, self.down1, self.down2 = block(2 * d, b), block(b, 2 * b), block(2 * b, 4 * b)
        self.bot = block(4 * b, 8 * b)
        self.up1, self.conv_up1 = nn.ConvTranspose2d(8 * b, 4 * b, 2, stride=2), block(6 * b, 4 * b)
        self.up2, self.conv_up2 = nn.ConvTranspose2d(4 * b, 2 * b, 2, stride=2), block(3 * b, b)
        self.outc = nn.Conv2d(b, 2 * d, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        y = self.conv_up1(torch.cat([self.up1(self.bot(x3)), x2], 1))
        y = self.conv_up2(torch.cat([self.up2(y), x1], 1))
        return self.outc(y)


def step(net, psi):
    d = psi.shape[-1]
    x = torch.cat([psi.real, psi.imag], -1).permute(0, 3, 1, 2)
    y = net(x).permute(0, 2, 3, 1)
    delta = torch.complex(y[..., :d], y[..., d:]) * psi
    phi = psi + delta - GAMMA * psi
    return phi / (phi.abs().pow(2).sum(-1, keepdim=True).sqrt() + 1e-9)


def read(folder, name):
    with open(f"{folder}/{name}", "rb") as f:
        return torch.frombuffer(bytearray(f.read()), dtype=torch.float32)


def load(net, flat):
    at, state = 0, net.state_dict()
    for name, t in state.items():
        state[name] = flat[at:at + t.numel()].reshape(t.shape)
        at += t.numel()
    assert at == flat.numel(), "the dump is of another network"
    net.load_state_dict(state)


def check(net, folder, d):
    grid = 64
    psi = torch.view_as_complex(read(folder, "psi_0.f32").reshape(1, grid, grid, d, 2))
    for _ in range(DUMP_STEPS):
        psi = step(net, psi)
    diff = (torch.view_as_real(psi).flatten() - read(folder, "psi_end.f32")).abs().max().item()
    print(f"same weights, same start: after {DUMP_STEPS} steps psi differs by at most {diff:.1e}")
    assert diff < 1e-3, "the two do not compute the same law"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--dump", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--d", type=int, default=8)
    p.add_argument("--b", type=int, default=32)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--case", action="append", default=[])
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    net = Net(a.d, a.b).eval()
    load(net, read(a.dump, "weights.f32"))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, eager, float32, inference_mode")
    with torch.inference_mode():
        check(net, a.dump, a.d)
        for case in a.case or ["64,1", "64,16", "128,1", "128,16"]:
            grid, batch = map(int, case.split(","))
            psi = torch.randn(batch, grid, grid, a.d, dtype=torch.complex64)
            ms = []
            for i in range(2 + a.repeat):
                t = time.perf_counter()
                psi = step(net, psi)
                if i >= 2:
                    ms.append((time.perf_counter() - t) * 1e3)
            ms.sort()
            median = ms[len(ms) // 2]
            flop = 2 * (232 * a.b**2 + 20 * a.b * a.d) * grid * grid * batch
            print(f"grid {grid:3d} batch {batch:2d}  {median:8.2f} ms/step (min {ms[0]:8.2f})  "
                  f"{flop / median / 1e6:6.1f} GFLOP/s (max {flop / ms[0] / 1e6:6.1f})")
            print(f"RESULT {grid} {batch} {median:.4f} {ms[0]:.4f}", flush=True)


if __name__ == "__main__":
    main()
