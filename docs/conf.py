"""Sphinx reads the pages of this folder as Markdown (MyST); nothing of the package is imported."""

import re
from pathlib import Path

__all__: list[str] = []

_source = (Path(__file__).resolve().parents[1] / "dinov2" / "__init__.py").read_text(encoding="utf-8")

project = "dinov2-anywhere"
author = "The dinov2-anywhere authors"
release = re.findall(r'^__version__ = "(.+)"$', _source, re.MULTILINE)[0]
version = release

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# Links to files beside docs/ (LICENSE, presets) are right in the repository and have no page here; tests/test_docs.py
# checks that their targets exist.
suppress_warnings = ["myst.xref_missing"]

html_theme = "alabaster"
html_title = f"{project} {release}"
html_show_sourcelink = False
