"""Commands of the release, run as files from a clone: `PYTHONPATH=. python dinov2/run/train/train.py ...`."""

__all__: list[str] = []
