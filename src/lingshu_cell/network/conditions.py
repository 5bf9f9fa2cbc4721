"""What a denoiser is told about a cell beforehand: categories, perturbations with doses, a context of control cells, a
prior effect, and library size. Every part may be absent, and every cell may lack any part.

Shapes: B cells, C category fields, P perturbations (control is one of them), Q numbers of
an embedding, K profiles, J numbers of a profile, G genes.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Profiles:
    """A table of gene profiles that cells refer to by row; row 0 is never read and stands for *none*.

    Attributes
    ----------
    table_KJG
        J numbers of each gene: for a context of control cells the share that detects it and the mean log(1 + count);
        for a prior effect the expected change of its log mean.
    row_B
        Row of each cell, int64; 0 = none.
    """

    table_KJG: Tensor
    row_B: Tensor

    def known(self) -> Tensor:
        """Which cells have a profile, boolean, shape B."""
        return self.row_B > 0

    def distinct(self) -> tuple[Tensor, Tensor]:
        """Give the profiles that occur, R × J × G, and each cell's place among them, B; row 0 reads as zeros."""
        rows_R, place_B = torch.unique(self.row_B, return_inverse=True)
        profile_RJG = self.table_KJG[rows_R].float().masked_fill((rows_R == 0)[:, None, None], 0.0)
        return profile_RJG, place_B


@dataclass(frozen=True)
class Conditions:
    """Conditions of a minibatch of cells.

    Attributes
    ----------
    category_BC
        Category of each field, int64; 0 = unknown.
    perturbation_BP
        1 where a perturbation was applied (several may be), the column of control for control cells; all 0 = unknown.
    dose_BP
        Standardised log dose of the applied perturbations, 0 elsewhere.
    embedding_PQ
        What is known beforehand of each perturbation, e.g. of the targeted gene; the same for all cells.
    context, effect
        Profiles of control cells of the same identity, and of the expected effect.
    depth_B
        log of the library size to be had, NaN = not asked for.
    """

    category_BC: Tensor
    perturbation_BP: Tensor | None = None
    dose_BP: Tensor | None = None
    embedding_PQ: Tensor | None = None
    context: Profiles | None = None
    effect: Profiles | None = None
    depth_B: Tensor | None = None

    @staticmethod
    def of(given: "Conditions | Tensor") -> "Conditions":
        """Take conditions as they are; a plain tensor B × C stands for categories alone."""
        return given if isinstance(given, Conditions) else Conditions(given)

    def __len__(self) -> int:
        return len(self.category_BC)

    def rows(self, rows: slice) -> "Conditions":
        """Give the conditions of some of the cells."""
        of_cells = {f: getattr(self, f) for f in ("category_BC", "perturbation_BP", "dose_BP", "depth_B")}
        tables = {f: getattr(self, f) for f in ("context", "effect")}
        return replace(
            self,
            **{f: None if value is None else value[rows] for f, value in of_cells.items()},
            **{f: None if p is None else replace(p, row_B=p.row_B[rows]) for f, p in tables.items()},
        )

    def only(self, known_B: Tensor) -> "Conditions":
        """Forget every condition of the cells where ``known_B`` is false."""
        rest = self.without_categories(known_B).without_perturbation(known_B)
        return rest.without_context(known_B).without_depth(known_B)

    def without_categories(self, known_B: Tensor, n_fields: int | None = None) -> "Conditions":
        """Forget the categories, or those of the first fields only, of the cells where ``known_B`` is false."""
        category_BC = self.category_BC.clone()
        category_BC[:, :n_fields] *= known_B[:, None]
        return replace(self, category_BC=category_BC)

    def without_perturbation(self, known_B: Tensor) -> "Conditions":
        """Forget perturbation, dose and prior effect of the cells where ``known_B`` is false."""
        effect = None if self.effect is None else replace(self.effect, row_B=self.effect.row_B * known_B)
        masked = {
            name: None if value is None else value * known_B[:, None]
            for name, value in (("perturbation_BP", self.perturbation_BP), ("dose_BP", self.dose_BP))
        }
        return replace(self, effect=effect, **masked)

    def without_context(self, known_B: Tensor) -> "Conditions":
        """Forget the context of the cells where ``known_B`` is false."""
        if self.context is None:
            return self
        return replace(self, context=replace(self.context, row_B=self.context.row_B * known_B))

    def without_depth(self, known_B: Tensor) -> "Conditions":
        """Forget the depth asked for where ``known_B`` is false."""
        return self if self.depth_B is None else replace(self, depth_B=self.depth_B.masked_fill(~known_B, torch.nan))

    def to(self, device: torch.device | str) -> "Conditions":
        """Give the same conditions on another device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Profiles):
                value = Profiles(value.table_KJG.to(device), value.row_B.to(device))
            elif value is not None:
                value = value.to(device)
            moved[field.name] = value
        return Conditions(**moved)
