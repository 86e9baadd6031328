"""Checkpoints: where they lie, and how their weights get into a module."""
