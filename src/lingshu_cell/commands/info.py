"""The command ``lingshu info``."""

from lingshu_cell.commands.options import Json, RunFolder
from lingshu_cell.console import give, give_json

EXAMPLES = (
    "lingshu info run",
    "lingshu info run --json",
)


def info(run: RunFolder, json: Json = False) -> None:
    """Say what a trained model is: data, genes, conditions, settings, quality."""
    from lingshu_cell.model import run_info

    facts = run_info(run)
    if json:
        give_json(facts)
        return
    conditions = {
        key: f"{', '.join(values[:5])}{', …' if len(values) > 5 else ''} ({len(values)})"
        for key, values in facts["conditions"].items()
    }
    nelbo, bits = facts["validation_nelbo_nats_per_cell"], facts["validation_nelbo_bits_per_gene"]
    rows = {
        "run": f"{facts['run']} ({facts['checkpoint']})",
        "model": f"{facts['preset']}, {facts['network']} denoiser, {facts['n_parameters']:,} parameters",
        "training": f"step {facts['step']:,} of {facts['steps']:,}"
        + ("" if facts["finished"] else "; --resume goes on"),
        "quality": "not validated"
        if nelbo is None
        else f"{nelbo:,.1f} nats per held-out cell, {bits:.4f} bits per gene",
        "cells": f"{facts['n_training_cells']:,} for training, {facts['n_validation_cells']:,} held out for validation",
        "genes": f"{facts['n_genes']:,}, of which {facts['n_modelled_genes']:,} are modelled",
        "conditions": "; ".join(f"{key}: {text}" for key, text in conditions.items()) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "licence": facts["licence"],
    }
    for name, text in rows.items():
        give(f"{name:<11} {text}")
