"""Frozen features and what is measured on them: extraction, cache, metrics, result rows."""

from dinov2.features.extract import Features, extract_features

__all__ = ["Features", "extract_features"]
