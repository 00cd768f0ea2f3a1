"""Clip to tokens: tubelets, positions, budgets and the selection of tokens."""
