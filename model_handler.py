"""ModelHandler, where CVAT's functions have it: beside main.py. Its code is in `defectcam/handler.py`."""

from defectcam.handler import ModelHandler

__all__ = ["ModelHandler"]
