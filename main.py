"""What Nuclio loads and calls: `main:handler` of function.yaml. Its code is in `defectcam/function.py`."""

from defectcam.function import handler, init_context

__all__ = ["handler", "init_context"]
