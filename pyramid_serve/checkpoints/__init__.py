"""Checkpoints: where they are, and how their weights are loaded into a module."""
