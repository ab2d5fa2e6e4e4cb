"""Measures, simulated annotator and Eq. 3 (paper 4.3). Offline half."""
