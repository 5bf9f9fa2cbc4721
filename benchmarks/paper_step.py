"""Time and memory of one training step and one generation step at 18,080 genes, on a CPU or a GPU.

    python benchmarks/paper_step.py
    python benchmarks/paper_step.py --device cuda --precisions bf16 --minibatches 64,256

Every case runs in its own process. The cells are real (bundled PBMC 3k); 18,080 genes are reached by giving some of
its detected genes twice. The state of a generation step is a cell of which half is visible, and it reveals the mean
number of genes of a step. The ceiling is a large matrix product at the same precision on the same device.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from recording import environment, markdown_table, run_in_child, say, write_result

N_GENES = 18_080  # the human gene list of the preprint
_CEILING_SIZE = {"cpu": 2_048, "cuda": 8_192}
_SEED = 0
_STEPS_WHERE_AUTOMATIC = 64  # of a preset that leaves the number of steps to each run's information curve


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes
    ----------
    preset, precision, device
        What runs, ``fp32`` or ``bf16`` (autocast), and where.
    training
        A training step, or else a generation step.
    n_cells
        Cells of the minibatch.
    repeats
        Timed repetitions after one that is not counted.
    n_genes
        Length of the gene list.
    """

    preset: str
    precision: str
    device: str
    training: bool
    n_cells: int
    repeats: int
    n_genes: int


def real_tokens(n_cells: int, n_genes: int) -> Any:
    """Give count tokens of random PBMC cells, int16 tensor, cells × genes.

    All genes detected in 3 or more cells are taken, then random ones of them again until there are enough.
    """
    import anndata as ad
    import numpy as np
    import torch

    from lingshu_cell.data.tokenizer import encode
    from lingshu_cell.datasets import pbmc3k_path

    counts = ad.read_h5ad(pbmc3k_path()).X.tocsc()
    detected = np.flatnonzero(np.diff(counts.indptr) >= 3)
    rng = np.random.default_rng(_SEED)
    genes = np.concatenate([detected, rng.choice(detected, max(n_genes - len(detected), 0))])[:n_genes]
    cells = rng.choice(counts.shape[0], n_cells, replace=n_cells > counts.shape[0])
    return torch.from_numpy(encode(counts[cells][:, genes].toarray().astype(np.int32)))


def token_counts(x_0_BG: Any) -> Any:
    """Count in how many cells each gene shows each token."""
    import torch

    from lingshu_cell.tokens import N_EXPRESSION_TOKENS

    n_genes = x_0_BG.shape[1]
    place_BG = x_0_BG.long() + N_EXPRESSION_TOKENS * torch.arange(n_genes)
    counts = torch.bincount(place_BG.flatten(), minlength=n_genes * N_EXPRESSION_TOKENS)
    return counts.unflatten(0, (n_genes, N_EXPRESSION_TOKENS))


def measure(case: Case) -> dict[str, Any]:
    """Time one case, count its operations by formula and by PyTorch's counter, and measure the ceiling.

    Parameters
    ----------
    case
        What to measure.

    Returns
    -------
    dict
        The case, and the measurements of it or, when it needs more memory than there is, ``why`` there are none.
    """
    import torch
    from cost import network_cost
    from torch.utils.flop_counter import FlopCounterMode

    from lingshu_cell.config import load_config
    from lingshu_cell.data.tokenizer import token_midpoints
    from lingshu_cell.network.denoiser import build_denoiser, make_fast
    from lingshu_cell.network.set_denoiser import ConditionSizes

    config = load_config(case.preset)
    x_0_BG = real_tokens(case.n_cells, case.n_genes)
    cost = network_cost(config.network, case.n_genes, 0, float((x_0_BG > 0).float().mean()), case.training)
    network = build_denoiser(config.network, case.n_genes, ConditionSizes(), torch.from_numpy(token_midpoints()), _SEED)
    if hasattr(network, "start_at_frequencies"):  # as training starts: what a step draws depends on it
        network.start_at_frequencies(token_counts(x_0_BG))
    network, x_0_BG = network.to(case.device), x_0_BG.to(case.device)
    prepare = _training_step if case.training else _generation_step
    step, n_asked = prepare(network, x_0_BG, config, case)
    try:
        with FlopCounterMode(display=False) as counter:
            step()
        make_fast(network, case.precision)  # after counting, which does not look into compiled code
        if case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step()  # warms up, and compiles
        seconds = [_timed(step, case.device) for _ in range(case.repeats)]
    except torch.OutOfMemoryError:
        return {**asdict(case), "why": "out of memory"}
    median = statistics.median(seconds)
    flops = (cost.with_backward if case.training else cost.of)(case.n_cells, n_asked)
    ceiling = _ceiling(case)
    n_steps = 1 if case.training else _n_steps(config)
    return {
        **asdict(case),
        "n_parameters": sum(p.numel() for p in network.parameters()),
        "seconds": median,
        "all_seconds": seconds,
        "steps_per_cell": n_steps,
        "cells_per_second": case.n_cells / median / n_steps,
        "gflop": flops / 1e9,
        "gflop_counted_by_torch": counter.get_total_flops() / 1e9,
        "gflop_per_second": flops / median / 1e9,
        "matmul_gflop_per_second": ceiling,
        "share_of_matmul": flops / median / 1e9 / ceiling,
        "device_peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if case.device == "cuda" else None,
        "torch_threads": torch.get_num_threads(),
    }


def _training_step(network: Any, x_0_BG: Any, config: Any, case: Case) -> tuple[Callable[[], None], float]:
    """Forward, backward, clipping, AdamW and two averages, as train.py does it; and the genes scored in each cell."""
    import torch

    from lingshu_cell.diffusion.loss import nelbo_estimate
    from lingshu_cell.diffusion.noising import MaskLaw
    from lingshu_cell.ema import PowerEma

    settings = config.training
    parameters = dict(network.named_parameters())
    optimiser = torch.optim.AdamW(
        parameters.values(), settings.peak_learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    averages = [PowerEma(sigma, parameters) for sigma in settings.ema_sigma_rel]
    generator = torch.Generator(case.device).manual_seed(_SEED)
    # the paper's law, under which half of the genes are scored on average, so that all presets do the same
    law = MaskLaw(0.0)
    condition_B0 = torch.zeros(case.n_cells, 0, dtype=torch.int64, device=case.device)

    def step() -> None:
        network.train()
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = nelbo_estimate(network, x_0_BG, condition_B0, law, generator).mean() / case.n_genes
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.clip_norm)
        optimiser.step()
        for average in averages:
            average.update(parameters, 1)

    return step, case.n_genes / 2


def _generation_step(network: Any, x_0_BG: Any, config: Any, case: Case) -> tuple[Callable[[], None], float]:
    """One network evaluation and the draw of the genes of a mean step; and how many these are."""
    import torch

    from lingshu_cell.network.distribution import Positions
    from lingshu_cell.tokens import MASK_TOKEN

    network.eval()
    generator = torch.Generator(case.device).manual_seed(_SEED)
    n_revealed = max(round(case.n_genes / _n_steps(config)), 1)
    order_BG = torch.argsort(torch.rand(x_0_BG.shape, generator=generator, device=case.device), dim=1)
    x_t_BG = torch.where(order_BG < case.n_genes // 2, x_0_BG, MASK_TOKEN).to(x_0_BG.dtype)
    revealed = (order_BG >= case.n_genes // 2) & (order_BG < case.n_genes // 2 + n_revealed)
    positions = Positions.where(revealed)
    uniform_M2 = torch.rand(len(positions), 2, generator=generator, device=case.device)
    condition_B0 = torch.zeros(case.n_cells, 0, dtype=torch.int64, device=case.device)

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            network(x_t_BG, condition_B0).draw(positions, uniform_M2)

    return step, n_revealed


def _n_steps(config: Any) -> int:
    return _STEPS_WHERE_AUTOMATIC if config.generation.steps == "auto" else config.generation.steps


def _ceiling(case: Case) -> float:
    """GFLOP/s of a large square matrix product."""
    import torch

    n = _CEILING_SIZE[case.device]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=case.device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / statistics.median(_timed(lambda: a @ b, case.device) for _ in range(5)) / 1e9


def _timed(step: Callable[[], object], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time  # CPU seconds: other work does not slow them
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the cases; the last column compares with ``small`` at the same precision."""
    small = {(r["precision"], r["training"]): r.get("cells_per_second") for r in rows if r["preset"] == "small"}
    lines = []
    for r in rows:
        base, speed = small.get((r["precision"], r["training"])), r.get("cells_per_second")
        memory = r.get("device_peak_memory_gib") or r.get("peak_memory_gib")
        step = "training" if r["training"] else "generation"
        lines.append([r["preset"], r["precision"], step, r["n_cells"], r.get("seconds", r.get("why")), memory])
        lines[-1] += [r.get(key) for key in ("steps_per_cell", "cells_per_second", "gflop", "gflop_counted_by_torch")]
        lines[-1] += [r.get("share_of_matmul"), base / speed if base and speed else None]
    header = [
        "preset",
        "precision",
        "step",
        "cells",
        "seconds",
        "peak GiB",
        "steps per cell",
        "cells/s",
        "GFLOP by formula",
    ]
    return markdown_table([*header, "GFLOP counted", "share of matmul speed", "small is faster by"], lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--presets", default="small,paper-s32,paper")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--steps", default="training,generation", help="which of the two to measure")
    parser.add_argument("--minibatches", help="cells per training step; 2 on a CPU (small: 128), 64,256 on CUDA")
    parser.add_argument("--generated", type=int, help="cells per generation step; 4 (small: 128), 64 on CUDA")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-genes", type=int, default=N_GENES)
    parser.add_argument("--name", help="name of the result; paper_step-DEVICE")
    return parser.parse_args()


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All measurements that the command line asks for."""
    cases = []
    for preset, precision, step in product(args.presets.split(","), args.precisions.split(","), args.steps.split(",")):
        on_cpu, small, training = args.device == "cpu", preset == "small", step == "training"
        if training:
            usual = ("128" if small else "2") if on_cpu else "64,256"
            sizes = (args.minibatches or usual).split(",")
        else:
            sizes = [args.generated or ((128 if small else 4) if on_cpu else 64)]
        cases += [Case(preset, precision, args.device, training, int(n), args.repeats, args.n_genes) for n in sizes]
    return cases


def main() -> None:
    """Measure every case and write the result."""
    args, facts, rows = parse(), environment(), []
    for case in cases_of(args):
        say(f"{case.preset} {case.precision} {'training' if case.training else 'generation'}, {case.n_cells} cells")
        rows.append(run_in_child(measure, case))
        say(f"  {rows[-1].get('seconds', float('nan')):.3g} s")
    about = (
        f"One step at {args.n_genes:,} genes on {args.device}: forward, backward, clipping, AdamW and two averages for "
        "training; one network evaluation and the draw of a mean step's genes for generation. Median of "
        f"{args.repeats} after one. Peak memory is that of the process (on CUDA that of the allocator). cells/s of "
        "generation count all steps of the preset. Seconds on a CPU are CPU seconds of the process. PyTorch's counter "
        "does not count attention on a CPU."
    )
    write_result(args.name or f"paper_step-{args.device}", about, facts, {"cases": rows}, [table(rows)])


if __name__ == "__main__":
    sys.exit(main())
