"""Analysis of features without labels: principal components, maps of patches, attention, health."""

__all__: list[str] = []
