"""Weight files: located, opened in any known layout, loaded strictly, resized and written."""

__all__: list[str] = []
