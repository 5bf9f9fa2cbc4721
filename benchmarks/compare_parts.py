"""Which head, which encoder, which optimiser: held-out NELBO against steps, CPU seconds and operations.

    OMP_NUM_THREADS=1 python benchmarks/compare_parts.py economy
    OMP_NUM_THREADS=1 python benchmarks/compare_parts.py heads
    OMP_NUM_THREADS=1 python benchmarks/compare_parts.py encoders

All runners of a part see the same cells in the same minibatches (same size) and take turns in one process, so that a
noisy machine hits all alike. No conditions. The bound is measured on all held-out cells under the same masks.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from alternatives.group_encoders import OwnWeightGroups, SharedMapGroups
from alternatives.latent_encoder import LatentDenoiser
from alternatives.masks import complementary_masks, product_masks, unstratified_masks
from alternatives.negative_binomial_head import NegativeBinomialHead
from alternatives.optimisers import muon, muon_and_codes
from alternatives.race import Recipe, Runner, crossing, race
from alternatives.softmax_head import SoftmaxHead
from data_sets import NAMES, read_cells
from recording import RESULTS, ROOT, environment, markdown_table, run_in_child, say, write_result
from torch import nn

from lingshu_cell.config import SetConfig
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.data.training_set import TrainingSet, assemble
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.network.denoiser import build_denoiser

_SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_FEW_SHARES = (0.3, 0.6, 1.0)
_TARGETS = (2850.0, 2800.0, 2790.0, 2780.0, 2770.0)
_ABOUT = {
    "economy": "Our network (preset `small`), minibatch 128, cosine, one thing changed at a time.",
    "heads": "Heads on our network's trunk; peak memory is that of a process that takes two steps "
    "of 128 cells, Python and data included.",
    "encoders": "Encoders with our gate-and-values head at equal CPU seconds of training; the learning rate is 1e-3, "
    "ours 2e-3.",
}
_UNIFORM, _HALF_LOG = MaskLaw(0.0), MaskLaw(0.5, 1.0)


def ours(cells: TrainingSet, seed: int) -> nn.Module:
    """Build the product's network (preset ``small``), started at the token frequencies."""
    network = build_denoiser(
        SetConfig(), len(cells.modelled), cells.conditions.sizes, torch.from_numpy(token_midpoints()), seed
    )
    network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
    return network


def ours_from_zero(cells: TrainingSet, seed: int) -> nn.Module:
    """Build the product's network with the head's biases at zero; what a gene is expected to show stays known."""
    network = ours(cells, seed)
    with torch.no_grad():
        for name in ("gate_bias_G", "small_bias_GK", "tail_bias_GJ"):
            getattr(network.head, name).zero_()
    return network


def with_head(make: Callable[[int, SetConfig], nn.Module]) -> Callable[[TrainingSet, int], nn.Module]:
    """Give a builder of the product's network with another head on the same trunk.

    Parameters
    ----------
    make
        From the number of genes and the network's sizes to a head.
    """

    def build(cells: TrainingSet, seed: int) -> nn.Module:
        network = ours(cells, seed)
        network.head = make(len(cells.modelled), SetConfig())
        network.head.initialise(torch.Generator().manual_seed(seed))
        network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
        return network

    return build


def softmax_head(n_genes: int, sizes: SetConfig) -> nn.Module:
    """All 281 logits of every gene, from 8 numbers of the cell and the gene."""
    return SoftmaxHead(n_genes, sizes.width, sizes.gene_width, 8, torch.from_numpy(token_midpoints()))


def mixture_head(n_genes: int, sizes: SetConfig, n_components: int) -> nn.Module:
    """Negative binomials and free probabilities of 0, 1, 2 and 3."""
    return NegativeBinomialHead(n_genes, sizes.width, sizes.gene_width, n_components, 4)


def with_encoder(encoder: Callable[..., nn.Module], **sizes: int) -> Callable[[TrainingSet, int], nn.Module]:
    """Give a builder of another encoder with the gate-and-values head."""

    def build(cells: TrainingSet, seed: int) -> nn.Module:
        network = encoder(
            len(cells.modelled),
            torch.from_numpy(token_midpoints()),
            gene_width=SetConfig().gene_width,
            generator=torch.Generator().manual_seed(seed),
            **sizes,
        )
        network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
        return network

    return build


HEADS = {
    "gate and values": ours,
    "softmax, 281 logits of rank 8": with_head(softmax_head),
    "2 negative binomials, 4 spikes": with_head(partial(mixture_head, n_components=2)),
    "3 negative binomials, 4 spikes": with_head(partial(mixture_head, n_components=3)),
}


def heads(steps: int, seconds: float, seed: int) -> list[Recipe]:
    """Each head at equal steps of a quarter of the cells, as the softmax takes seconds for one; and all but the
    softmax at equal CPU seconds of the usual minibatches.
    """
    few = partial(Recipe, steps=steps, minibatch_size=32, seed=seed)
    return [few(f"{name}, {steps} steps", build) for name, build in HEADS.items()] + [
        Recipe(f"{name}, {seconds:g} CPU s", build, cpu_seconds=seconds, seed=seed)
        for name, build in HEADS.items()
        if not name.startswith("softmax")
    ]


def encoders(seconds: float, seed: int) -> list[Recipe]:
    """Each encoder for the same CPU seconds; the smaller the groups, the smaller the minibatch has to be."""
    paper = partial(with_encoder, SharedMapGroups, width=128, n_blocks=2, n_heads=4)
    own = partial(with_encoder, OwnWeightGroups, width=256, n_blocks=3, n_heads=4)
    latents = with_encoder(LatentDenoiser, n_latents=64, width=128, n_blocks=3, n_heads=4, answer_width=512)
    recipe = partial(Recipe, cpu_seconds=seconds, seed=seed)
    return [
        recipe("set with tied codes (ours)", ours),
        recipe("paper's groups, S = 8", paper(genes_per_group=8), minibatch_size=8, peak_learning_rate=1e-3),
        recipe("paper's groups, S = 32", paper(genes_per_group=32), minibatch_size=32, peak_learning_rate=1e-3),
        recipe("paper's groups, S = 128", paper(genes_per_group=128), peak_learning_rate=1e-3),
        recipe("weights of their own, S = 1,024", own(genes_per_group=1_024), peak_learning_rate=1e-3),
        recipe("weights of their own, S = 2,048", own(genes_per_group=2_048), peak_learning_rate=1e-3),
        recipe("64 latents", latents, peak_learning_rate=1e-3),
    ]


def step_memory(head: str, data: str) -> dict[str, Any]:
    """Take two optimiser steps; to be called in a process of its own, which gives the peak memory."""
    torch.set_num_threads(1)
    runner = Runner(Recipe(head, HEADS[head], steps=2), assemble([read_counts(read_cells(data))]), 1)
    runner.turn(1e9, 1.0)
    return {"head": head}


def economy(steps: int, seed: int) -> list[Recipe]:
    """Change one thing at a time in the training of our network."""
    recipe = partial(Recipe, build=ours, steps=steps, seed=seed)
    return [
        recipe("base: AdamW, half log-uniform masks with exact weights"),
        recipe("base, another seed", seed=seed + 1),
        recipe("weights density^-½ (the product's default)", estimate=product_masks(MaskLaw(0.5, 0.5))),
        recipe("uniform masks", estimate=product_masks(_UNIFORM)),
        recipe("uniform and complementary masks", estimate=complementary_masks),
        recipe("masks not stratified", estimate=unstratified_masks(_HALF_LOG)),
        recipe("head's biases start at zero", build=ours_from_zero),
        recipe("AdamW, twice the learning rate", peak_learning_rate=4e-3),
        recipe("Muon for linear maps", optimisers=muon),
        recipe("Muon for linear maps and gene codes", optimisers=muon_and_codes),
    ]


def economy_table(rows: list[dict[str, Any]]) -> list[str]:
    """Steps and CPU seconds to each bound, and the bound under each average."""
    reach = []
    for row in rows:
        reach.append([row["name"], row["cpu_seconds_per_step"]])
        for axis in ("step", "cpu_seconds"):
            reach[-1] += [whole(crossing(row["points"], target, "0.1", axis)) for target in _TARGETS]
    header = ["", "CPU s per step", *(f"steps to {t:.0f}" for t in _TARGETS), *(f"CPU s to {t:.0f}" for t in _TARGETS)]
    bounds = [["", *(f"step {point['step']}" for point in rows[0]["points"])]]
    lines = [[row["name"], *(point["nelbo"].get("0.1") for point in row["points"])] for row in rows]
    averages = [
        [row["name"], point["step"], *(point["nelbo"].get(name) for name in ("last", "0.05", "0.1"))]
        for row in rows
        for point in row["points"]
        if len(point["nelbo"]) > 1
    ]
    return [
        "Steps and CPU seconds to a held-out NELBO (nats per cell, EMA .10):",
        markdown_table(header, reach),
        "Held-out NELBO, EMA .10:",
        markdown_table(bounds[0], [[line[0], *map(tenth, line[1:])] for line in lines]),
        "Held-out NELBO under the last weights and the two averages:",
        markdown_table(
            ["", "step", "last weights", "EMA .05", "EMA .10"], [[*a[:2], *map(tenth, a[2:])] for a in averages]
        ),
    ]


def economy_sections(rows: list[dict[str, Any]]) -> list[str]:
    """Bounds by step, steps and CPU seconds to each bound, and the bound under each average."""
    averages = [
        [row["name"], point["step"], *(tenth(point["nelbo"].get(name)) for name in ("last", "0.05", "0.1"))]
        for row in rows
        for point in row["points"]
        if len(point["nelbo"]) > 1
    ]
    steps = [f"step {point['step']}" for point in rows[0]["points"]]
    return [
        "Held-out NELBO, nats per cell, EMA .10:",
        markdown_table(["", *steps], [[row["name"], *bounds(row)] for row in rows]),
        "Steps and CPU seconds to a held-out NELBO, interpolated:",
        reach_table(rows, _TARGETS),
        "Held-out NELBO under the last weights and the two averages:",
        markdown_table(["", "step", "last weights", "EMA .05", "EMA .10"], averages),
    ]


def other_sections(rows: list[dict[str, Any]]) -> list[str]:
    """Size and cost of each runner, and its bound along the way."""
    header = ["", "cells per step", "parameters", "peak GiB", "training MFLOP per cell", "CPU s per cell", "steps"]
    header += ["CPU s", "best NELBO", "NELBO by the way (step: nats)"]
    lines = []
    for row in rows:
        last = row["points"][-1]
        course = ", ".join(f"{point['step']}: {point['nelbo']['0.1']:,.0f}" for point in row["points"])
        per_cell = row["cpu_seconds_per_step"] / row["minibatch_size"]
        lines.append([row["name"], row["minibatch_size"], f"{row['n_parameters'] / 1e6:.1f} M"])
        lines[-1] += [row.get("peak_memory_gib"), row["training_flops_per_cell"] / 1e6, per_cell, last["step"]]
        lines[-1] += [last["cpu_seconds"], tenth(min(p["nelbo"]["0.1"] for p in row["points"])), course]
    return [markdown_table(header, lines)]


def reach_table(rows: list[dict[str, Any]], targets: Sequence[float]) -> str:
    """When each runner reaches each bound under EMA .10."""
    header = ["", "CPU s per step", *(f"steps to {t:,.0f}" for t in targets), *(f"CPU s to {t:,.0f}" for t in targets)]
    lines = []
    for row in rows:
        lines.append([row["name"], row["cpu_seconds_per_step"]])
        for axis in ("step", "cpu_seconds"):
            lines[-1] += [whole(crossing(row["points"], target, "0.1", axis)) for target in targets]
    return markdown_table(header, lines)


def bounds(row: dict[str, Any]) -> list[str | None]:
    """The bounds of a runner under EMA .10, to a tenth."""
    return [tenth(point["nelbo"].get("0.1")) for point in row["points"]]


def whole(value: float | None) -> int | None:
    """Round to a whole number."""
    return None if value is None else round(value)


def tenth(value: float | None) -> str | None:
    """Round to a tenth."""
    return None if value is None else f"{value:,.1f}"


def all_weights(share: float) -> Sequence[str]:
    """Validate every average in the middle and at the end, else EMA .10 alone."""
    return ("0.1", "0.05", "last") if share in (0.45, 1.0) else ("0.1",)


def recipes_of(args: argparse.Namespace) -> list[Recipe]:
    """All runners that the command line asks for."""
    if args.part == "economy":
        recipes = economy(args.steps, args.seed)
    elif args.part == "heads":
        recipes = heads(args.steps, args.seconds, args.seed)
    else:
        recipes = encoders(args.seconds, args.seed)
    return [recipe for recipe in recipes if re.search(args.only, recipe.name)]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("economy", "heads", "encoders"))
    parser.add_argument("--data", default="pbmc3k", help=f"one of {', '.join(NAMES)}, or an h5ad file")
    parser.add_argument("--steps", type=int, default=240, help="optimiser steps of runners with a budget of steps")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of runners with a budget of seconds")
    parser.add_argument("--until", type=float, default=1.0, help="stop at this share of the budget, rates as if not")
    parser.add_argument("--held-out", type=int, default=270, help="validation cells that are used, about")
    parser.add_argument("--only", default="", help="regular expression: only runners whose name has a match")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the numbers that are there")
    parser.add_argument("--name", help="name of the result; compare_parts-PART")
    return parser.parse_args()


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Race all runners of a part."""
    torch.set_num_threads(1)
    cells = assemble([read_counts(read_cells(args.data))])
    start, log = time.process_time(), ROOT / "build" / "compare_parts" / f"{name}.json"
    shares, weights = (_SHARES, all_weights) if args.part == "economy" else (_FEW_SHARES, lambda share: ("0.1",))
    shares = [share for share in shares if share <= args.until]
    rows = race(recipes_of(args), cells, shares, weights, log, say, args.held_out)
    if args.part == "heads":
        names = [row["name"].rsplit(", ", 1)[0] for row in rows]
        memory = {name: run_in_child(step_memory, name, args.data) for name in dict.fromkeys(names)}
        rows = [row | memory[name] for row, name in zip(rows, names, strict=True)]
    return {
        "data": args.data,
        "n_training_cells": len(cells.train),
        "n_held_out": min(args.held_out, len(cells.validation)),
        "n_modelled_genes": len(cells.modelled),
        "rows": rows,
        "cpu_seconds_in_all": time.process_time() - start,
    }


def main() -> None:
    """Run one part, or read what it gave, and write the result."""
    args, facts = parse(), environment()
    name = args.name or f"compare_parts-{args.part}"
    if args.page_only:
        body = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        facts = {key: body[key] for key in facts}
    else:
        body = measure(args, name)
    about = (
        f"{body['data']}: {body['n_training_cells']:,} training cells, about {body['n_held_out']} held-out cells under "
        f"2 masks each, {body['n_modelled_genes']:,} genes, no conditions. {_ABOUT[args.part]} {body.get('remark', '')}"
    )
    about = about.strip()
    sections = (economy_sections if args.part == "economy" else other_sections)(body["rows"])
    write_result(name, about, facts, {**body, "about": about}, sections)


if __name__ == "__main__":
    sys.exit(main())
