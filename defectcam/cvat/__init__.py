"""Commands that work on a task of a running CVAT through its REST API: `defectcam cvat ...`. Offline half, but for the doctor."""
