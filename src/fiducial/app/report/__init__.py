"""The report of a run: one HTML file that needs nothing else and asks nothing of the network."""

from fiducial.app.report.build import build, render

__all__ = ["build", "render"]
