"""PIA: a picture brought to life by a prompt, on any Stable Diffusion 1.5 model. arXiv 2312.13964."""
