"""Data sources: one file each reads pairs of a video and its captions."""
