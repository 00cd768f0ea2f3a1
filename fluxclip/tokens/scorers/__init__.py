"""Scorers, one file each: patch vectors (B, N, L, D) to scores (B, N, L), higher kept first."""
