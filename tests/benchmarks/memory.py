"""Peak memory and speed of an evaluation at 5000 samples, by the number of images.

    python tests/benchmarks/memory.py [--samples 5000]

Each row runs in a process of its own, and its peak resident size is compared with that of a process that only builds
the model: what the evaluation takes must not grow with the data set beyond the data and the results themselves.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time


def child(images: int, samples: int) -> None:
    import torch

    import pyrovae as pv

    torch.manual_seed(0)
    vae = pv.models.VAE((1, 28, 28), latent_dim=50)
    x = pv.data.Images(torch.full((max(images, 1), 1, 28, 28), 0.2), binarization="dynamic")
    began = time.perf_counter()
    if images:
        pv.log_likelihood(vae.model, vae.guide, x, num_samples=samples, seed=0)
    seconds = time.perf_counter() - began
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.samples)
        return
    base = 0.0
    print(f"{'images':>7} {'peak above start':>17} {'images x samples / s':>21}")
    for images in (0, 100, 400, 1600):
        command = [sys.executable, __file__, "--samples", str(options.samples), "--child", str(images)]
        peak, seconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        base = base or peak
        if images:
            print(f"{images:7} {peak - base:13.0f} MiB {images * options.samples / seconds:21,.0f}")


if __name__ == "__main__":
    main()
