"""The function file for cvat-cli; its code and parameters are in `defectcam/cvat/auto_annotation.py`.

    pip install --constraint constraints.txt '.[runtime,cvat]' cvat-cli  # without a GPU: '.[runtime-cpu,cvat]'
    cvat-cli task auto-annotate 7 --function-file cvat_function.py -p iterations=int:4
"""

import sys
from pathlib import Path

# cvat-cli loads this file by its path, which makes nothing beside it importable. This folder comes first, so that its own
# package is imported and not another version that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from defectcam.cvat.auto_annotation import create  # noqa: E402

__all__ = ["create"]
