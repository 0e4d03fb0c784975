"""One self-contained HTML page about a training run: figures, curves, pictures, configuration."""

from dinov2.report.training import write_report

__all__ = ["write_report"]
