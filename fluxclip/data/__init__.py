"""Captions and files to training batches."""
