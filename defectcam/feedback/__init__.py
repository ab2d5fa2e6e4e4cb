"""From what annotators did in CVAT to the next weights (paper Fig. 1, 3.2). Offline half."""
