"""Objectives: one file each turns features of a batch into a loss."""
