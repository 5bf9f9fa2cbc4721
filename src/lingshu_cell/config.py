"""Every setting of a run, in one place: strict sections, named presets, and how files and the command line change
them.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import read_toml
from lingshu_cell.tokens import STATE_FIELDS

_MOST_WEIGHTS = 1 << 37
_MOST_CELLS_AT_ONCE = 1 << 20
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Width = Annotated[float, Field(gt=0, lt=0.28)]  # a power function cannot be wider


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """What is read from the AnnData files and how cells are split."""

    layer: str | None = Field(None, description="Layer with raw counts; X when not given. A store has but one.")
    condition_keys: tuple[str, ...] = Field((), description="obs columns the model is conditioned on, e.g. cell_type.")
    perturbation_key: str | None = Field(
        None, description="obs column of perturbations (gene target, cytokine, drug; control cells have a label too)."
    )
    control: str | None = Field(None, description="Label of control cells in perturbation_key.")
    combination_separator: str = Field("+", description="What joins the parts of a combination; empty: none.")
    dose_key: str | None = Field(None, description="obs column of doses, numbers above 0 in one unit.")
    control_share: float = Field(
        1.0, gt=0, le=1, description="Most that control cells may be of the training cells (paper: 0.1); 1 keeps all."
    )
    context: bool = Field(
        True, description="With perturbations: also condition on an average of control cells of the same identity."
    )
    prior_effects: bool = Field(
        True, description="With perturbations: also tell the effect expected from other identities or from embeddings."
    )
    embeddings: tuple[str, ...] = Field(
        (), description="Files of gene or drug embeddings (npz, parquet, safetensors, csv) for perturbations not seen."
    )
    silenced: bool = Field(
        False, description="Also test by pdex which genes perturbations silence, for lingshu generate --prior silenced."
    )
    depth: Literal["auto"] | bool = Field(
        "auto", description="Also condition on library size, which is then drawn first; auto: in small."
    )
    states: Literal["auto"] | Annotated[int, Field(ge=0, le=4096)] = Field(
        "auto",
        description="Cell states (groups by k-means) to condition on, drawn before all else, and half as many "
        "programmes (what is left within states); with perturbations those of control cells; 0: none; auto: in small "
        "without perturbations, one per 100 training cells, 8 to 64.",
    )
    split: str | None = Field(None, description="TOML file of held-out conditions, see docs/splits.md.")
    min_cells_per_gene: int = Field(
        3, ge=0, description="Genes detected in fewer training cells are drawn from their frequency, not modelled."
    )
    min_coverage: float = Field(
        0.5, ge=0, le=1, description="Least share of the gene list every file must cover; not asked of a store."
    )
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="Share of cells held out for the validation NELBO.")
    split_seed: int = Field(
        0, ge=0, description="Seed of the training / validation split; of a store: which block of its cells validates."
    )

    @property
    def control_field(self) -> tuple[str, str] | None:
        """Field of the perturbations and name of control; None without perturbations."""
        return None if self.perturbation_key is None else (self.perturbation_key, self.control)

    def assembly(self) -> dict[str, Any]:
        """Give the settings that decide how data sets are brought together."""
        later = {
            "layer",
            "combination_separator",
            "context",
            "prior_effects",
            "embeddings",
            "depth",
            "silenced",
            "states",
        }
        return self.model_dump(exclude=later)

    @model_validator(mode="after")
    def _perturbations_have_a_control(self) -> "DataConfig":
        if (self.perturbation_key is None) != (self.control is None):
            raise ValueError("perturbation_key and control go together")
        if len(set(self.condition_keys)) < len(self.condition_keys):
            raise ValueError("condition_keys names a column twice")
        if self.perturbation_key in self.condition_keys:
            raise ValueError(f"'{self.perturbation_key}' is the perturbation_key, not one of condition_keys")
        if taken := [name for name in STATE_FIELDS if name in self.condition_keys]:
            raise ValueError(f"'{taken[0]}' is what cell states are called; give the column another name")
        if self.perturbation_key is None and (self.dose_key or self.embeddings or self.silenced):
            raise ValueError("dose_key, embeddings and silenced need a perturbation_key")
        return self


def _checked_size(network: Any) -> Any:
    """Refuse networks that no machine holds, before one is asked for the memory."""
    n_weights = network.n_blocks * network.width * network.feedforward_width
    if n_weights > _MOST_WEIGHTS:
        raise ValueError(f"{n_weights:,} weights in the blocks alone fit into no machine")
    return network


class TransformerConfig(_Section):
    """The paper's network: shared token embedding, groups of genes, bidirectional transformer, softmax head."""

    kind: Literal["transformer"] = "transformer"
    width: int = Field(640, ge=8, description="Width D of every token.")
    n_blocks: int = Field(13, ge=1, description="Transformer blocks.")
    n_heads: int = Field(10, ge=1, description="Attention heads; width / n_heads is even.")
    feedforward_width: int = Field(2560, ge=8, description="Hidden width of SwiGLU.")
    genes_per_group: int = Field(8, ge=1, description="S: genes flattened into one transformer token.")

    @model_validator(mode="after")
    def _fits_some_machine(self) -> "TransformerConfig":
        return _checked_size(self)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TransformerConfig":
        if self.width % (2 * self.n_heads):
            raise ValueError(f"width ({self.width}) must be a multiple of 2 x n_heads ({self.n_heads})")
        return self


class SetConfig(_Section):
    """Our network: the visible genes are summed as a set, a residual trunk reads the sum, a gate-and-values head
    answers.
    """

    kind: Literal["set"] = "set"
    gene_width: int = Field(128, ge=4, description="Width E of each gene's input and output weights.")
    width: int = Field(512, ge=8, description="Width D of the trunk.")
    n_blocks: int = Field(3, ge=1, description="Residual SwiGLU blocks of the trunk.")
    feedforward_width: int = Field(1024, ge=8, description="Hidden width of SwiGLU.")
    n_small_values: int = Field(
        16, ge=2, le=99, description="K: counts 1..K-1 have logits of their own, K and more a tail."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the output of each block.")

    @model_validator(mode="after")
    def _fits_some_machine(self) -> "SetConfig":
        return _checked_size(self)


class TrainingConfig(_Section):
    """Optimiser, schedule and bookkeeping of one training run."""

    steps: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Optimiser steps; auto = 40 passes over the cells (5 with perturbations), 300 to 4,000 steps.",
    )
    max_seconds: float | None = Field(
        None, gt=0, description="Training ends after so many seconds if not earlier; the learning rate follows."
    )
    minibatch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST_CELLS_AT_ONCE)] = Field(
        128,
        description="Cells per optimiser step, over all processes; auto: the preset's, halved till it fits.",
    )
    microbatch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Cells that each process computes at once; auto: all, and half when memory runs out."
    )
    sharding: Literal["none", "full"] = Field(
        "none", description="With several processes: each holds the whole network (DDP), or a part of it (FSDP2)."
    )
    peak_learning_rate: float = Field(2e-3, gt=0, description="Learning rate after warm-up.")
    final_learning_rate: float = Field(1e-4, ge=0, description="Learning rate at the end of the cosine.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.02, ge=0, description="AdamW weight decay on matrices.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.95), description="AdamW betas.")
    clip_norm: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    ema_sigma_rel: tuple[_Width, _Width] = Field(
        (0.05, 0.10), description="Relative widths of the two power-function EMAs."
    )
    ema_every: int = Field(1, ge=1, description="Steps between two updates of the EMAs.")
    masking: Literal["uniform", "log-uniform"] = Field(
        "log-uniform", description="Law of the visible share: uniform (paper), or half uniform, half log-uniform."
    )
    weight_power: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of a mask is density^-power: 1 is the exact bound, less favours first genes.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 = autocast of the trunk; heads stay in fp32.")
    condition_dropout: float = Field(0.1, ge=0, le=1, description="Share of cells trained without their conditions.")
    balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A condition of n cells is trained on n^(1 - balance) times; 0 = as often as it is.",
    )
    identity_dropout: float = Field(
        0.2, ge=0, le=1, description="Share of cells trained on their context in place of their identity labels."
    )
    depth_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of cells trained without their library size, where depth is a condition."
    )
    state_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of cells trained without state and programme, where there are states."
    )
    keep_best: bool = Field(
        True, description="With validation conditions: generate from the step that foretold them best, not the last."
    )
    validate_every: int = Field(250, ge=1, description="Steps between two validation passes.")
    checkpoint_every: int = Field(500, ge=1, description="Steps between two checkpoints.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of initialisation, minibatches and masks.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    tensorboard: bool = Field(False, description="Write TensorBoard events beside history.csv.")


class GenerationConfig(_Section):
    """How cells are generated from a trained run."""

    steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16, description="Network evaluations per cell, or auto: the fewest that keep to max_kl."
    )
    schedule: Literal["auto", "optimal", "geometric", "cosine", "uniform"] = Field(
        "auto",
        description="How many genes a step reveals; auto: optimal if the run has an information curve, else geometric.",
    )
    max_kl: float = Field(1.0, gt=0, description="With steps = auto: most nats per cell that few steps may cost.")
    guidance_scale: float = Field(
        1.0, description="Strength of a perturbation beyond control: 1 as trained, 0 control, more exaggerates (w + 1)."
    )
    guidance_space: Literal["log-mean", "logits"] = Field(
        "log-mean", description="What guidance moves: the mean of each count, or all logits (paper)."
    )
    guidance_clip: float = Field(2.0, gt=0, description="Most that guidance may change a log mean.")
    guidance_ramp: float = Field(
        0.0, ge=0, description="Guidance grows with (share of visible genes)^ramp; 0 = the same at every step."
    )
    minibatch_size: int = Field(
        256, ge=1, le=_MOST_CELLS_AT_ONCE, description="Cells held in memory at once, rounded up to whole tiles."
    )
    tile_size: Literal["auto"] | Annotated[int, Field(ge=2, le=1 << 16)] = Field(
        "auto",
        description="Rows of a network call, on which a cell's rounding depends; auto: 64, of small on a GPU 1024.",
    )
    shard_cells: int = Field(
        2048, ge=2, le=1 << 20, description="Most cells of a shard, where cells are written to a folder."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the run; cell i uses (seed, i).")


class Config(_Section):
    """A whole run: data, network, training, generation."""

    preset: str = "small"
    data: DataConfig = DataConfig()
    network: TransformerConfig | SetConfig = Field(SetConfig(), discriminator="kind")
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def has_depth(self) -> bool:
        """Whether library size is a condition."""
        return self.network.kind == "set" if self.data.depth == "auto" else self.data.depth


def _paper(genes_per_group: int) -> dict[str, Any]:
    return {
        "network": {"kind": "transformer", "genes_per_group": genes_per_group},
        "training": {
            "steps": 550_000,
            "minibatch_size": 256,
            "peak_learning_rate": 2e-4,
            "final_learning_rate": 2e-5,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "masking": "uniform",
            "weight_power": 1.0,
            "precision": "bf16",
            "condition_dropout": 0.0,
            "validate_every": 1_000,
            "checkpoint_every": 1_000,
        },
        "generation": {"steps": 256, "schedule": "cosine", "guidance_space": "logits", "minibatch_size": 64},
    }


PRESETS: dict[str, dict[str, Any]] = {"small": {}, "paper": _paper(8), "paper-s32": _paper(32)}
"""What each preset changes from the defaults: ``small`` is the defaults; the ``paper`` presets are the preprint's."""


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Build a configuration from a preset, then a TOML file, then ``section.key=value`` settings, the later winning.

    Parameters
    ----------
    preset
        One of ``small``, ``paper``, ``paper-s32``; what the file says, or ``small``, when not given.
    file
        TOML file with the sections ``data``, ``network``, ``training``, ``generation`` and, if wanted, ``preset``.
    settings
        Strings like ``training.steps=200``; the value is read as TOML, and as plain text where it is no TOML.
    overrides
        Nested mapping with the last word, for callers in Python.
    base
        Whole configuration to start from in place of the preset's, e.g. that of a run to be resumed.

    Raises
    ------
    LingshuError
        On an unknown preset, section or key, a value of the wrong type or outside its range, or an unreadable file.
    """
    from_file = _read_toml(file) if file else {}
    stated = from_file.pop("preset", None)
    preset = preset or stated or "small"
    if not isinstance(preset, str) or preset not in PRESETS:
        raise LingshuError("The preset must exist", f"'{preset}'", f"Choose one of {', '.join(PRESETS)}")
    if stated not in (None, preset):
        raise LingshuError("There is one preset", f"'{preset}' asked for, '{stated}' in {file}", "Leave one out")
    values: dict[str, Any] = {"preset": preset}
    for layer in (PRESETS[preset] if base is None else base, from_file, _parse_settings(settings), overrides or {}):
        values = _merge(values, layer)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _as_user_error(error, values) from None


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    if "network" in merged and isinstance(merged["network"], Mapping) and "kind" not in merged["network"]:
        merged["network"] = {"kind": "set", **merged["network"]}
    return merged


def _read_toml(file: Path) -> dict[str, Any]:
    return read_toml(file, "The configuration must be a readable TOML file")


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        path = name.strip().split(".")
        if not separator or len(path) != 2 or not all(path):
            raise LingshuError(
                "A setting must read section.key=value", f"'{setting}'", "Write for example --set training.steps=200"
            )
        values.setdefault(path[0], {})[path[1]] = _parse_value(text.strip())
    return values


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
        return parsed["value"] if len(parsed) == 1 else text
    except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError, but none of TOML's
        return text


def _as_user_error(error: ValidationError, values: Mapping[str, Any]) -> LingshuError:
    first = error.errors()[0]
    where = _setting_at(first)
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        return LingshuError("Every setting must be known", f"'{where}'", f"Known here: {', '.join(known)}")
    found = f"{where} = {first['input']!r}: {' or '.join(e['msg'] for e in error.errors() if _setting_at(e) == where)}"
    others = {_setting_at(e) for e in error.errors()} - {where}
    more = f" (and {len(others)} more)" if others else ""
    return LingshuError(
        "Every setting must have a valid value", found + more, "See lingshu train --help or docs/config.md"
    )


def _setting_at(error: Mapping[str, Any]) -> str:
    """Name the setting an error of pydantic is about, without the alternatives it has within a setting."""
    alternatives = ("set", "transformer", "constrained-int", "literal['auto']")
    return ".".join(str(part) for part in error["loc"] if part not in alternatives)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[_Section]] = {
        "data": DataConfig,
        "set": SetConfig,
        "transformer": TransformerConfig,
        "training": TrainingConfig,
        "generation": GenerationConfig,
    }
    for part in reversed(path):
        if part in sections:
            return list(sections[str(part)].model_fields)
    return list(Config.model_fields)
