"""Clicks or masks -> crops -> network -> weights with a manifest (paper 3, 4.1, 4.2). Offline half."""
