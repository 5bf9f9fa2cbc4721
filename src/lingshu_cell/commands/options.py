"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.config import PRESETS, GenerationConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout in place of text.")]
Preset = Annotated[str | None, typer.Option(metavar="NAME", help=f"{', '.join(PRESETS)}; small when not given.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings; lingshu config prints one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated. See lingshu config."),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what memory, disk and time it will take, after a short measurement.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that lingshu train wrote.")]


def of_generation(setting: str) -> str:
    """Describe a setting of generation in the words of config.py."""
    return str(GenerationConfig.model_fields[setting].description)


Steps = Annotated[
    str | None, typer.Option(metavar="N|auto", help=f"{of_generation('steps')} The run's own when not given.")
]
Unseen = Annotated[
    str, typer.Option(help="Perturbations never trained: error, or embedding (models with data.embeddings).")
]
MaxKl = Annotated[float | None, typer.Option(metavar="NATS", help=of_generation("max_kl"))]
Join = Annotated[
    str, typer.Option(metavar="union|intersection|GENES.txt", help="The joint gene list; a file has one per line.")
]
SpeciesOf = Annotated[
    list[str] | None, typer.Option(metavar="FILE=SPECIES", help="Species of a file, if it does not say.")
]
Aliases = Annotated[
    Path | None, typer.Option(metavar="HGNC.tsv", help="HGNC's complete set: former symbols of human genes.")
]
GeneTables = Annotated[
    list[str] | None,
    typer.Option(metavar="SPECIES=FILE", help="Table of Ensembl ids and symbols of a species; may be repeated."),
]
Orthologs = Annotated[
    list[str] | None,
    typer.Option(metavar="[SPECIES=]FILE", help="Table of orthologs of two species; may be repeated."),
]
SeparateSpecies = Annotated[
    bool, typer.Option("--separate-species", help="Let species without a table of orthologs keep their own genes.")
]


def read_steps(text: str | None) -> int | str | None:
    """Read ``--steps``: a whole number, ``auto``, or nothing."""
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,18}", text) else text


def read_source(name: str | None) -> Path | str | None:
    """A path, or a URL as it is."""
    return name if name is None or "://" in name else Path(name)
