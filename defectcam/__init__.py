"""Defect proposals for CVAT: a weakly trained classifier, its climbed activation maps, and outlines from them.

The modules directly in this package are the runtime half (what the serverless function needs); the
folders are the offline half, which the runtime half never imports.
"""

__version__ = "0.1.0"
