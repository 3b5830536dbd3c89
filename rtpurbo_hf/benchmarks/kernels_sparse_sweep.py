"""Sweep of sparse prefill on this machine: launches of its kernels, and settings of its selection.

Cases, each with `setting` in its row; `ms` is the retrieval heads' time of one layer, on the inputs of
`kernels_sparse_prefill`:

    sweep_attend   keys of a step and stages, or the portable kernel's launch    the selection is the shipped one
    sweep_score    rows, keys, columns and stages of the scoring kernel          `ms` is the selection alone
    sweep_select   block size, representing rows, cells, mass to reach, pieces   with the best launches found before

Settings of the selection change what is read: compare them at equal `kept_mass`. A setting that does not fit into the
device is left out of the rows and logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from ..kernels import sparse_prefill, sparse_prefill_hopper, sparse_prefill_triton, tile_blocks
from .harness import Row, checked, measure
from .kernels_prefill import PAPER
from .kernels_sparse_prefill import RATIO, TOLERANCE, SparseLayer

logger = logging.getLogger(__name__)

LENGTHS = {"quick": (131_072,), "paper": (131_072, 1_048_576), "full": (32_768, 131_072, 524_288, 1_048_576)}
Setting = dict[str, Any]

ATTEND: tuple[Setting, ...] = (
    {},
    {"keys": 128, "stages": 3},
    {"keys": 64, "stages": 4},
    {"rows": 128, "warps": 8, "stages": 3, "step_keys": 64},
    {"rows": 128, "warps": 8, "stages": 2, "step_keys": 128},
    {"rows": 64, "warps": 4, "stages": 3, "step_keys": 64},
)
SCORE: tuple[Setting, ...] = (
    {},
    {"keys": 64},
    {"rows": 128, "keys": 64},
    {"rows": 128, "keys": 32},
    {"rows": 128},
    {"columns": 16, "steps": 4},
    {"steps": 32},
    {"stages": 2},
    {"stages": 4},
)
SELECT: tuple[Setting, ...] = (
    {},
    {"MISSED": 1.0},
    {"MISSED": 0.5},
    {"BLOCK": 16},
    {"BLOCK": 64},
    {"BLOCK": 128},
    {"FAR": 0},
    {"FAR": 1 << 40},
    {"FAR": 0, "FAR_GROUP": 4},
    {"CELLS": 4},
    {"CELLS": 16},
    {"WORKSPACE_BYTES": 1 << 30},
)


@contextmanager
def attending(setting: Setting) -> Iterator[None]:
    """The attention kernel with another launch; {} leaves it as shipped.

    `keys` and `stages` are the Hopper kernel's; with `rows` it is the portable one, and `step_keys` its keys of a step.
    """
    with ExitStack() as stack:
        if "rows" in setting:
            launch = (setting["rows"], setting["warps"], setting["stages"], False)
            stack.enter_context(mock.patch.object(sparse_prefill, "hopper_fits", return_value=False))
            stack.enter_context(mock.patch.object(sparse_prefill_triton, "_launch", return_value=launch))
            stack.enter_context(mock.patch.object(sparse_prefill_triton, "STEP_KEYS", setting["step_keys"]))
        elif setting:
            tiles = {PAPER.head_dim: (64, setting["keys"], setting["stages"], 240)}
            stack.enter_context(mock.patch.dict(sparse_prefill_hopper.TILES, tiles))
        yield


@contextmanager
def scoring(setting: Setting) -> Iterator[None]:
    """The scoring kernel with another launch."""
    with mock.patch.object(tile_blocks, "MASS_LAUNCH", tile_blocks.MASS_LAUNCH | setting):
        yield


@contextmanager
def selecting(setting: Setting) -> Iterator[None]:
    """Other constants of the selection, in the modules that hold them."""
    with ExitStack() as stack:
        for module in (tile_blocks, sparse_prefill):
            held = {name: value for name, value in setting.items() if hasattr(module, name)}
            if held:
                stack.enter_context(mock.patch.multiple(module, **held))
        yield


def _describe(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items()) or "shipped"


def _row(case: str, sparse: SparseLayer, setting: Setting, *, alone: bool = False) -> Row:
    """One setting's time, checked against the reference under the same settings."""
    layer = sparse.layer
    layer.out.fill_(math.nan)
    sparse.run_sparse()
    error, kept = sparse.check()
    blocks = sum(int(count.sum()) for count in sparse.select())
    per_tile = tile_blocks.TILE // tile_blocks.BLOCK
    tiles = -(-layer.length // tile_blocks.TILE)
    causal = len(layer.retrieval) * per_tile * tiles * (tiles + 1) // 2
    select = measure(sparse.select, warmup=1, repeats=5, budget_ms=300)
    whole = measure(sparse.run_sparse, warmup=0, repeats=5, budget_ms=600)
    chosen = select if alone else whole
    extra: dict[str, Any] = {
        "geometry": str(layer.geometry),
        "setting": _describe(setting),
        "selected": blocks / causal,
        **kept,
        "retrieval_ms": whole.median_ms,
        "select_ms": select.median_ms,
        "low_ms": chosen.low_ms,
        "high_ms": chosen.high_ms,
        **checked(error, TOLERANCE),
    }
    return Row(case, layer.length, RATIO, chosen.median_ms, None, None, extra)


def _best(rows: list[Row], settings: list[Setting]) -> Setting:
    """The fastest setting whose result is right; {} where none is."""
    good = [(row.ms, place) for place, row in enumerate(rows) if row.extra["check"] == "ok"]
    return settings[min(good)[1]] if good else {}


def sweep_length(length: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one length, and its best settings."""
    sparse = SparseLayer.make(PAPER, length)
    found: list[Row] = []

    def part(case: str, settings: tuple[Setting, ...], enter, *, alone: bool = False) -> Setting:
        rows: list[Row] = []
        tried: list[Setting] = []
        for setting in tqdm(settings, desc=f"{case} {length}", unit="setting", leave=False):
            try:
                with enter(setting):
                    rows.append(_row(case, sparse, setting, alone=alone))
                    tried.append(setting)
            except Exception as error:
                # too much shared memory, or what this version of Triton cannot compile
                logger.warning("%s, %s: left out: %s", case, _describe(setting), error)
                torch.cuda.empty_cache()
        found.extend(rows)
        return _best(rows, tried)

    attend = part("sweep_attend", ATTEND, attending)
    with attending(attend):
        score = part("sweep_score", SCORE, scoring, alone=True)
        with scoring(score):
            part("sweep_select", SELECT, selecting)
    return found, {"attend": attend, "score": score}


def run(preset: str = "paper") -> tuple[list[Row], dict[str, Any]]:
    """Rows and `{length: best launches}` ({}: as shipped); `"quick"` 128K, `"paper"` also 1M, `"full"` four lengths.

    Raises:
        ValueError: unknown preset. RuntimeError: no CUDA device.
    """
    if preset not in LENGTHS:
        raise ValueError(f"preset must be one of {', '.join(LENGTHS)}, got {preset!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("the kernel benchmarks need a CUDA device")
    rows: list[Row] = []
    best: dict[str, Any] = {}
    for length in LENGTHS[preset]:
        found, launches = sweep_length(length)
        rows += found
        best[str(length)] = launches
        torch.cuda.empty_cache()
    return rows, best
