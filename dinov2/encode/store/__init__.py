"""Features of many images on disk: written in numbered parts that survive a kill, read column by column.

`parts` writes and resumes, `opened` reads whatever was written, `writing` and `reading` know the four formats.
"""

from dinov2.encode.store.opened import StoredFeatures, open_features

__all__ = ["StoredFeatures", "open_features"]
