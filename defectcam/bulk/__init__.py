"""Proposals for whole folders of photos, as files that CVAT imports. Offline half."""
