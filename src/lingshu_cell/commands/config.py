"""The command ``lingshu config``."""

from lingshu_cell.commands.options import ConfigFile, Json, Preset, Settings
from lingshu_cell.config import load_config
from lingshu_cell.console import give, give_json, settings_toml

EXAMPLES = (
    "lingshu config > my.toml",
    "lingshu train cells.h5ad --out run --config my.toml",
    "lingshu config --preset paper",
)


def show_config(
    preset: Preset = None, config: ConfigFile = None, settings: Settings = None, json: Json = False
) -> None:
    """Print every setting with its meaning, as a TOML file to edit."""
    chosen = load_config(preset, config, settings or ())
    give_json(chosen.model_dump(mode="json")) if json else give(settings_toml(chosen))
