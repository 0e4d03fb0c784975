"""Features of many images on disk: written in numbered shards that survive a kill, read column by column.

`shards` writes and resumes, `merge` finishes, `reader` opens whatever was written, `tables` knows the file formats,
`cache` finds features by what they were made of.
"""

from dinov2.encode.store.reader import StoredFeatures, open_features

__all__ = ["StoredFeatures", "open_features"]
