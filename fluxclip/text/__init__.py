"""Captions to features."""
