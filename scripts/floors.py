"""The architecture as a table: the rooms of the package by floor, and what each room may import.

A room is a folder or module at the package's root. Imports go down or stay inside the room; a change that needs another
entry here is a change of design. `tests/test_floors.py` holds the package to it, `scripts/generate_docs.py` shows it.
"""

__all__ = ["FLOORS", "MAY_IMPORT"]

GROUND = {"errors", "configs", "distributed", "logging", "file_lock", "whole_files"}
PARTS = {"layers", "loss", "data"}
MACHINES = {"models", "engine"}
FEATURES = {"checkpoints", "encode", "analysis"}
METHODS = {"train", "eval", "dense", "hf"}
CATALOGUE = {"hub", "report", "pretrained"}
BELOW_METHODS = GROUND | PARTS | MACHINES | FEATURES
BELOW_TOOLS = BELOW_METHODS | METHODS | CATALOGUE

FLOORS: dict[str, dict[str, set[str]]] = {
    "ground": {
        "errors": set(),
        "configs": {"errors", "whole_files"},
        "distributed": {"errors"},
        "logging": {"errors", "distributed"},
        "file_lock": {"errors"},
        "whole_files": {"errors", "file_lock"},
        "_moved": {"errors"},
    },
    "parts": {
        "layers": set(),
        "loss": {"distributed"},
        "data": GROUND,
    },
    "machines": {
        "models": {"errors", "layers"},
        "engine": GROUND,
    },
    "features": {
        "checkpoints": GROUND | MACHINES | {"layers"},
        "encode": GROUND | PARTS | MACHINES | {"checkpoints"},
        "analysis": GROUND | PARTS | MACHINES | {"encode"},
    },
    # Methods never import each other; what one needs of another is handed to it as a value.
    "methods": dict.fromkeys(sorted(METHODS), BELOW_METHODS),
    "catalogue": {
        "hub": {"errors", "models", "checkpoints", "dense"},
        "report": BELOW_METHODS | METHODS,
        "pretrained": BELOW_METHODS | METHODS,
    },
    "tools": {
        "apps": BELOW_TOOLS,
        "run": BELOW_TOOLS | {"apps"},
    },
    "entry points": {
        "cli": BELOW_TOOLS | {"apps", "run", "__init__"},
        "__init__": BELOW_TOOLS | {"apps", "run", "cli", "_moved"},
        "__main__": BELOW_TOOLS | {"apps", "run", "cli", "__init__"},
        "hubconf": {"hub"},
    },
}
"""Floors from the bottom; in each its rooms, and the rooms that each may import besides itself."""

MAY_IMPORT: dict[str, set[str]] = {room: allowed for rooms in FLOORS.values() for room, allowed in rooms.items()}
"""Room -> rooms that it may import."""
