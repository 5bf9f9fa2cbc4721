"""From files of counts to a training store: one gene list, quality rules, one global shuffle, shards; resumable.

Stages: look at the files and join their genes · scan all counts once · scatter cells to buckets in the order of one
permutation · turn each bucket into a shard · write the manifest, which makes the store valid.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_cell.data.gene_doctor import GeneList, JoinedGenes, join_genes
from lingshu_cell.data.gene_tables import GeneTables, read_tables, species_name
from lingshu_cell.data.quality import QualityRules, is_mitochondrial, table
from lingshu_cell.data.scan import Scan, scan
from lingshu_cell.data.sources import CountSource, identity, open_source
from lingshu_cell.data.store import open_store
from lingshu_cell.data.store_builder import StoreBuilder, joint_sum
from lingshu_cell.data.store_files import MANIFEST, WORK
from lingshu_cell.data.store_writer import unfinished_damaged, writing
from lingshu_cell.data.vocabulary import GeneVocabulary
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, read_text, refuse_special
from lingshu_cell.output_files import LOCK, locked, read_checked_json, write_checked_json

CELLS_PER_SHARD = 8_192


@dataclass(frozen=True)
class NameTables:
    """Files with what is known of gene names, see ``read_tables``.

    Attributes
    ----------
    aliases
        HGNC's complete set.
    gene_tables
        Species → table of Ensembl ids and symbols.
    orthologs
        Pairs of a species, or None, and a table.
    """

    aliases: Path | str | None = None
    gene_tables: Mapping[str, Path | str] = field(default_factory=dict)
    orthologs: Sequence[tuple[str | None, Path | str]] = ()

    @classmethod
    def from_texts(
        cls, aliases: Path | None = None, gene_tables: Sequence[str] = (), orthologs: Sequence[str] = ()
    ) -> "NameTables":
        """Take them as they are written on a command line.

        Parameters
        ----------
        aliases
            File.
        gene_tables
            ``SPECIES=FILE`` each.
        orthologs
            ``FILE`` or ``SPECIES=FILE`` each.

        Raises
        ------
        LingshuError
            If one is not written so.
        """
        pairs = [split_pair(text, "SPECIES=FILE") for text in gene_tables]
        joined = [(None, t) if Path(t).exists() or "=" not in t else split_pair(t, "SPECIES=FILE") for t in orthologs]
        return cls(aliases, dict(pairs), joined)

    def read(self) -> GeneTables:
        """Read them."""
        return read_tables(self.aliases, self.gene_tables, self.orthologs)

    def checksums(self) -> list[list[str]]:
        """Say which bytes they hold."""
        files = [("aliases", self.aliases)] if self.aliases else []
        files += [(f"genes of {species_name(s)}", f) for s, f in sorted(self.gene_tables.items())]
        files += [(f"orthologs {s or ''}".strip(), f) for s, f in self.orthologs]
        return [[what, identity(_existing(file))["sha256"]] for what, file in files]


@dataclass(frozen=True, eq=False)
class PrepareResult:
    """A finished store.

    Attributes
    ----------
    store
        The folder.
    up_to_date
        Whether it was there already, so that nothing was done.
    manifest
        Its manifest.
    seconds
        Wall time of each stage of this call.
    """

    store: Path
    up_to_date: bool
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]


def prepare(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    rules: QualityRules | None = None,
    name_tables: NameTables | None = None,
    species_of: Mapping[str, str] | None = None,
    join: str | Sequence[str] = "union",
    separate_species: bool = False,
    layer: str | None = None,
    obs_keys: Sequence[str] | None = None,
    cells_per_shard: int = CELLS_PER_SHARD,
    seed: int = 0,
    on_note: Callable[[str], None] = lambda text: None,
) -> PrepareResult:
    """Build a training store from files of raw counts, in memory that does not grow with the counts.

    Parameters
    ----------
    sources
        h5ad, zarr, Cell Ranger h5 files or mtx folders, one data set each.
    out
        Folder of the store. An interrupted store goes on where it stopped; a finished one of the same files and
        settings is left as it is.
    rules
        Which cells and genes to drop; None for none.
    name_tables
        Tables of gene names; None for none.
    species_of
        Source, as given in ``sources``, → species, where the file does not say.
    join
        ``"union"``, ``"intersection"``, or the wanted genes in order.
    separate_species
        Whether a species without a table of orthologs may keep its genes to itself.
    layer
        Layer of AnnData files that holds the counts; None for ``X``.
    obs_keys
        Labels to keep; None for all.
    cells_per_shard
        Cells of a shard, which must fit into memory several times.
    seed
        Seed of the shuffle and of Scrublet.
    on_note
        Called with lines for the user: reports and progress.

    Returns
    -------
    PrepareResult

    Raises
    ------
    LingshuError
        If files cannot be read, hold no counts or do not go together, ``out`` holds something else, or the disk is
        full.
    """
    if cells_per_shard < 1:
        raise LingshuError("A shard must hold cells", f"cells_per_shard is {cells_per_shard}", "Choose e.g. 8192")
    rules, name_tables, out = rules or QualityRules(), name_tables or NameTables(), expanded(out)
    paths = [_existing(path) for path in sources]
    names = data_set_names(paths)
    species = _stated_species(sources, species_of or {})
    settings = {
        "rules": rules.to_json(), "join": join if isinstance(join, str) else list(map(str, join)),
        "separate_species": separate_species, "layer": layer, "cells_per_shard": cells_per_shard, "seed": seed,
        "obs_keys": None if obs_keys is None else list(obs_keys), "species": species,
        "tables": name_tables.checksums(),
    }  # fmt: skip
    with _locked(out):
        job = _Job(paths, names, species, out, settings, rules, name_tables.read(), on_note)
        return job.run()


def examine(
    sources: Sequence[Path | str],
    *,
    name_tables: NameTables | None = None,
    species_of: Mapping[str, str] | None = None,
    join: str | Sequence[str] = "union",
    separate_species: bool = False,
    layer: str | None = None,
) -> JoinedGenes:
    """Join the genes of files as :func:`prepare` would, without reading counts or writing anything.

    Parameters
    ----------
    sources, name_tables, species_of, join, separate_species, layer
        As in :func:`prepare`.

    Returns
    -------
    JoinedGenes
        The joint list and a report for each data set.

    Raises
    ------
    LingshuError
        As :func:`prepare`.
    """
    paths = [_existing(path) for path in sources]
    stated = _stated_species(sources, species_of or {})
    lists = []
    for path, name, species in zip(paths, data_set_names(paths), stated, strict=True):
        with open_source(path, _layer_for(path, layer)) as source:
            lists.append(GeneList(name, source.gene_names, source.var, species or source.species))
    tables = (name_tables or NameTables()).read()
    return join_genes(lists, tables, join=join, separate_species=separate_species)


def data_set_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Name data sets by their files, with as many folders as it takes to tell them apart.

    Parameters
    ----------
    paths
        Files or folders.

    Returns
    -------
    tuple of str
        E.g. ``("pbmc3k", "pbmc8k")``, or ``("a-counts", "b-counts")`` for ``a/counts.h5ad`` and ``b/counts.h5ad``.

    Raises
    ------
    LingshuError
        If there is none, or one is given twice.
    """
    # A file name may be no Unicode, but the store holds names as text.
    whole = [Path(os.fspath(path.resolve()).encode("utf-8", "backslashreplace").decode("utf-8")) for path in paths]
    if not whole:
        raise LingshuError("A store needs data", "no file is given", "Name one or more files")
    if repeated := [str(path) for path in dict.fromkeys(whole) if whole.count(path) > 1]:
        raise LingshuError("Every file is given once", f"more than once: {offenders(repeated)}", "Remove the repeats")
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["-".join([*path.parts[:-1], path.name.split(".")[0] or path.name][-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{names[i]}-{i}" for i in range(len(names)))


def split_pair(text: str, form: str) -> tuple[str, str]:
    """Read ``LEFT=RIGHT``, where the left side may hold further equality signs.

    Raises
    ------
    LingshuError
        If a side is empty.
    """
    left, _, right = text.rpartition("=")
    if not left or not right:
        raise LingshuError(f"An option must read {form}", f"got {text!r}", f"Write it as {form}")
    return left, right


def joint_list(text: str) -> str | list[str]:
    """Read how genes are joined: ``union``, ``intersection``, or a file with one gene per line.

    Raises
    ------
    LingshuError
        If it is neither, or the file is empty or no text.
    """
    if text in ("union", "intersection"):
        return text
    rule = "Genes are joined by union, intersection or a list in a file"
    lines = read_text(text, rule, "Check the path").splitlines()
    genes = [line.strip() for line in lines if line.strip()]
    if not genes:
        raise LingshuError("A list of genes must hold genes", f"{text} is empty", "Write one gene per line")
    return genes


def _existing(path: Path | str) -> Path:
    found = expanded(path)
    refuse_special(found, "The data file must be readable")
    if not found.exists():
        remedy = "Download it first" if "://" in str(path) else "Check the path"
        raise LingshuError("The data file must exist", f"there is no {path}", remedy)
    return found


def _stated_species(sources: Sequence[Path | str], species_of: Mapping[str, str]) -> list[str | None]:
    given = {str(expanded(file)): species_name(species) for file, species in species_of.items()}
    known = [str(expanded(path)) for path in sources]
    if strange := [file for file in given if file not in known]:
        raise LingshuError(
            "A species is stated for one of the files", f"{offenders(strange)} is none", "Write the path as given"
        )
    return [given.get(path) for path in known]


def _layer_for(path: Path, layer: str | None) -> str | None:
    return layer if path.suffix in (".h5ad", ".zarr") else None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder, refuse one that holds something else, and keep other processes out."""
    if out.exists() and not out.is_dir():
        raise LingshuError("A store is a folder", f"{out} is a file", "Choose another --out")
    if out.is_dir():
        strange = [file.name for file in out.iterdir() if file.name not in (WORK, LOCK, MANIFEST)]
        if strange and not ((out / MANIFEST).exists() or (out / WORK).exists()):
            raise LingshuError(
                "The folder of a new store must be empty", f"{out} holds {offenders(strange)}", "Choose another --out"
            )
    with ExitStack() as stack:
        with writing(out):
            rule, finding = "Only one process may prepare a store", f"another one is writing {out}"
            stack.enter_context(locked(out, rule, finding, "Wait until it is done"))
        yield


class _Job:
    """One call of :func:`prepare`."""

    def __init__(
        self,
        paths: Sequence[Path],
        names: Sequence[str],
        species: Sequence[str | None],
        out: Path,
        settings: Mapping[str, Any],
        rules: QualityRules,
        tables: GeneTables,
        on_note: Callable[[str], None],
    ) -> None:
        self.paths, self.names, self.species, self.out = paths, names, species, out
        self.settings, self.rules, self.tables, self.say = settings, rules, tables, on_note
        self.work, self.seconds = out / WORK, {}
        self._started = time.monotonic()

    def run(self) -> PrepareResult:
        """Do what is left to do."""
        with writing(self.out):
            plan = self._plan()
            if (finished := self._finished(plan)) is not None:
                return finished
            self._begin(plan)
            self._done("checksums")
            with ExitStack() as stack:
                opened = [
                    stack.enter_context(open_source(p, _layer_for(p, self.settings["layer"]))) for p in self.paths
                ]
                joined = self._join(opened)
                self._done("genes")
                scans = self._scan(opened, joined)
                joined = self._drop_rare(joined, scans)
                self._done("scan")
                builder = StoreBuilder(
                    self.out, self.work, self.names, opened, joined, scans,
                    self.settings["cells_per_shard"], self.settings["seed"], self.settings["obs_keys"],
                )  # fmt: skip
                content = {**plan, "n_genes_dropped": self.n_rare_dropped, "version": version("lingshu-cell")}
                manifest = builder.build(content, self._done)
                for note in manifest["notes"]:
                    self.say(note)
            write_checked_json(self.out / "identities.json", self.identities)
            shutil.rmtree(self.work, ignore_errors=True)
        return PrepareResult(self.out, False, manifest, self.seconds)

    def _done(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._started, 3)
        self._started = now

    # --- what is there already --------------------------------------------------------------------------------------

    def _plan(self) -> dict[str, Any]:
        """Say which files and settings make the store; checksums of files that have not changed are remembered."""
        cache_file = self.out / ("identities.json" if (self.out / MANIFEST).exists() else f"{WORK}/identities.json")
        try:
            known = read_checked_json(cache_file)
        except (OSError, ValueError):
            known = {}
        self.identities = {n: identity(p, known.get(n)) for n, p in zip(self.names, self.paths, strict=True)}
        files = [{"name": n, "sha256": one["sha256"], "bytes": one["bytes"]} for n, one in self.identities.items()]
        return json.loads(json.dumps({"sources": files, "settings": self.settings}))

    def _finished(self, plan: Mapping[str, Any]) -> PrepareResult | None:
        if not (self.out / MANIFEST).exists():
            return None
        manifest = open_store(self.out).manifest  # which compares the sizes of all files
        self._refuse_others({key: manifest.get(key) for key in plan}, plan, "The store was made from")
        shutil.rmtree(self.work, ignore_errors=True)
        write_checked_json(self.out / "identities.json", self.identities)
        self.say(f"{self.out} is up to date: the same files and settings, nothing to do")
        return PrepareResult(self.out, True, manifest, self.seconds)

    def _begin(self, plan: Mapping[str, Any]) -> None:
        self.work.mkdir(exist_ok=True)
        for folder in ("shards", "arrays"):
            (self.out / folder).mkdir(exist_ok=True)
        journal = self.work / "plan.json"
        if journal.exists():
            try:
                begun = read_checked_json(journal)
            except ValueError as error:
                raise unfinished_damaged(self.work, f"{journal.name}: {error}") from None
            self._refuse_others(begun, plan, "The unfinished store is of")
            self.say("an interrupted store: going on where it stopped")
        write_checked_json(journal, plan)
        write_checked_json(self.work / "identities.json", self.identities)

    def _refuse_others(self, there: Mapping[str, Any], plan: Mapping[str, Any], what: str) -> None:
        old, new = there.get("settings") or {}, plan["settings"]
        differing = [key for key in new if old.get(key) != new[key]]
        if there.get("sources") != plan["sources"]:
            differing.insert(0, "files")
        if differing:
            raise LingshuError(
                "A store holds one set of files and settings",
                f"{what} others: {offenders(differing)} differ",
                f"Choose another --out, or delete {self.out} first",
            )

    # --- genes and scan ---------------------------------------------------------------------------------------------

    def _join(self, opened: Sequence[CountSource]) -> JoinedGenes:
        lists = [
            GeneList(name, source.gene_names, source.var, species or source.species)
            for name, source, species in zip(self.names, opened, self.species, strict=True)
        ]
        join, separate = self.settings["join"], self.settings["separate_species"]
        joined = join_genes(lists, self.tables, join=join, separate_species=separate)
        for report in joined.reports:
            self.say(report.describe())
        return joined

    def _scan(self, opened: Sequence[CountSource], joined: JoinedGenes) -> list[Scan]:
        scans = []
        for i, source in enumerate(opened):
            places = joined.columns[i]
            called = np.array([*joined.vocabulary.names, ""], dtype=object)[places]  # −1 takes the empty name
            mito = is_mitochondrial(source.gene_names) | is_mitochondrial(called)
            scans.append(scan(source, mito, self.rules, self.settings["seed"], self.work / f"scan-{i:04d}.npz"))
            for note in scans[-1].notes:
                self.say(f"{self.names[i]}: {note}")
        self.say(table({name: one.quality for name, one in zip(self.names, scans, strict=True)}))
        return scans

    def _drop_rare(self, joined: JoinedGenes, scans: Sequence[Scan]) -> JoinedGenes:
        """Leave out genes that too few kept cells show, where a rule asks for it."""
        detected = joint_sum([s.detected for s in scans], joined)
        keep = detected >= self.rules.min_cells_per_gene
        self.n_rare_dropped = int((~keep).sum())
        if keep.all():
            return joined
        if not keep.any():
            raise LingshuError(
                "Some genes must be detected often enough",
                f"none of {len(keep):,} is in {self.rules.min_cells_per_gene} cells",
                "Lower --min-cells-per-gene",
            )
        self.say(
            f"{self.n_rare_dropped:,} of {len(keep):,} genes are in fewer than {self.rules.min_cells_per_gene} cells"
        )
        new = np.append(np.where(keep, np.cumsum(keep) - 1, -1), -1)
        old = joined.vocabulary
        kept = np.flatnonzero(keep)
        ids = None if old.ensembl_ids is None else tuple(old.ensembl_ids[g] for g in kept)
        vocabulary = GeneVocabulary(tuple(old.names[g] for g in kept), ids)
        return JoinedGenes(vocabulary, tuple(new[c] for c in joined.columns), joined.measured[:, keep], joined.reports)
