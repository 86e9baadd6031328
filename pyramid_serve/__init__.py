"""Pyramid Serve: text and pictures in, video out."""
