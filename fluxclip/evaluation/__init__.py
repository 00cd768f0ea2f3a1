"""Evaluation: ranks, recall against token budget, and how both are reported."""
