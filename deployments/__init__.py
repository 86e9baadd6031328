"""The pipeline on Ray Serve: a deployment for each part of the pipeline, and what they share."""
