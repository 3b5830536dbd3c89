"""`rtpurbo bench kernels`: prefill and decode kernels against their peers, one table, one result file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .harness import Row, copy_bandwidth, environment, matmul_rate, table, write

PARTS = ("prefill", "sparse", "decode")
PRESETS = ("quick", "paper", "full")
COLUMNS = ("geometry", "batch", "tflops", "dense_path", "selected", "kept_mass", "check", "checked_error")


def run_kernel_benchmarks(
    preset: str, output: str | Path, only: str | None = None, *, name: str = "kernels", sweep: bool = False
) -> list[Row]:
    """Run, check and store the kernel benchmarks; needs a CUDA device.

    Args:
        preset: `"quick"` (a minute), `"paper"` (the lengths and geometry of the paper's figures) or `"full"`.
        output: folder for `name`.json, .csv and .png.
        only: `"prefill"`, `"sparse"` (sparse prefill) or `"decode"`; None: all.
        sweep: with `"sparse"`: its launches and selection settings instead, in minutes; the best ones by length go
            to the result file's `meta`.

    Raises:
        ValueError: unknown preset or part.
    """
    if only is not None and only not in PARTS:
        raise ValueError(f"only must be one of {PARTS} or None, got {only!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    if sweep:
        if only != "sparse":
            raise ValueError(f"there is a sweep of 'sparse' alone, got only={only!r}")
        from . import kernels_sparse_sweep

        swept, best = kernels_sparse_sweep.run(preset)
        write(swept, Path(output) / f"{name}-sweep", meta=environment() | {"preset": preset, "best": best})
        return swept
    rows: list[Row] = []
    if only in (None, "prefill"):
        from . import kernels_prefill

        rows += kernels_prefill.run(preset)
    if only in (None, "sparse"):
        from . import kernels_sparse_prefill

        rows += kernels_sparse_prefill.run(preset)
    if only in (None, "decode"):
        from . import kernels_decode

        rows += kernels_decode.run(preset)
    ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_matmul_flops_per_s": matmul_rate()}
    write(rows, Path(output) / name, meta=environment() | {"preset": preset, "ceilings": ceilings})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--sweep", action="store_true", help="with --only sparse: launches and settings")
    parser.add_argument("--name", default="kernels", help="basename of the result files")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rows = run_kernel_benchmarks(
        arguments.preset, arguments.output, arguments.only, name=arguments.name, sweep=arguments.sweep
    )
    print(table(rows, extra=("setting", "selected", "kept_mass", "check") if arguments.sweep else COLUMNS))
    if any(row.extra.get("check") != "ok" for row in rows):
        raise SystemExit("some results are wrong: see the rows whose check is red")


if __name__ == "__main__":
    main()
