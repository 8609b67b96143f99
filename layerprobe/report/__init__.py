"""From a run folder to one self-contained HTML page."""

from layerprobe.report.write import write_report

__all__ = ["write_report"]
