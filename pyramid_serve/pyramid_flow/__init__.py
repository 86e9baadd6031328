"""Pyramid Flow (arXiv 2410.05954): the model, exact, packed and streaming. Torch only, no Ray."""
