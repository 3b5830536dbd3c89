"""`rtpurbo bench kernels`: prefill and decode kernels against their peers, one table, one result file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from .harness import Row, copy_bandwidth, environment, matmul_rate, write
from .part_results import Results

PARTS = {"prefill": "kernels_prefill", "sparse": "kernels_sparse_prefill", "decode": "kernels_decode"}
PRESETS = ("quick", "paper", "full")
COLUMNS = ("geometry", "batch", "tflops", "dense_path", "selected", "kept_mass", "check", "checked_error")
SWEEP_COLUMNS = ("setting", "selected", "kept_mass", "check")


def run_kernel_benchmarks(
    preset: str, output: str | Path, only: str | None = None, *, name: str = "kernels", sweep: bool = False
) -> list[Row]:
    """Run, check and store the kernel benchmarks; needs a CUDA device.

    Args:
        preset: `"quick"` (a minute), `"paper"` (the lengths and geometry of the paper's figures) or `"full"`.
        output: folder for `name`.json, .csv and .png; rows of other parts that are there stay, as `Results` does it.
        only: `"prefill"`, `"sparse"` (sparse prefill) or `"decode"`; None: all.
        sweep: with `"sparse"`: its launches and selection settings instead, in minutes; the best ones by length go
            to the result file's `meta`.

    Raises:
        ValueError: unknown preset or part, or rows there that were measured elsewhere.
    """
    if only is not None and only not in PARTS:
        raise ValueError(f"only must be one of {tuple(PARTS)} or None, got {only!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    if sweep:
        if only != "sparse":
            raise ValueError(f"there is a sweep of 'sparse' alone, got only={only!r}")
        from . import kernels_sparse_sweep

        swept, best = kernels_sparse_sweep.run(preset)
        write(swept, Path(output) / f"{name}-sweep", meta=environment() | {"preset": preset, "best": best})
        return swept
    ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_matmul_flops_per_s": matmul_rate()}
    results = Results(Path(output) / name, environment() | {"preset": preset, "ceilings": ceilings})
    for part, module in PARTS.items():
        if only in (None, part):
            for row in import_module(f".{module}", __package__).run(preset):
                results.add(row)
    return results.close()
