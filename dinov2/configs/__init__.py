"""Configuration: a typed tree (`Config`), the release's YAML files, and recipes for small machines.

The release's helper names work: `dinov2_default_config`, `load_config(name)` and `load_and_merge_config(name)`. All
give a whole, checked `Config` here; in the release they are open OmegaConf trees.
"""

from typing import Final

from dinov2.configs.keys import KeyDescription, describe, to_dict
from dinov2.configs.loading import (
    apply_overrides,
    differing_keys,
    from_dict,
    load_and_merge_config,
    load_config,
    to_yaml,
)
from dinov2.configs.packaged import Preset, list_presets, packaged_names
from dinov2.configs.schema import Config

__all__ = [
    "Config",
    "KeyDescription",
    "Preset",
    "apply_overrides",
    "describe",
    "differing_keys",
    "dinov2_default_config",
    "from_dict",
    "list_presets",
    "load_and_merge_config",
    "load_config",
    "packaged_names",
    "to_dict",
    "to_yaml",
]

dinov2_default_config: Final = Config()
"""The default configuration, under the release's name for it."""
