"""Prompts in a person's own words, none of them a sentence of `scenes.py`.

Some of their words are in the training's prompts, some ("flying", "unmoving", "canvas") are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tools.shapes.scenes import Scene, sample_scene


class Phrase(NamedTuple):
    """A prompt and the four words that it means."""

    prompt: str
    color: str
    shape: str
    motion: str
    background: str

    def scene(self, rng: np.random.Generator) -> Scene:
        """Some scene that the prompt asks for."""
        return sample_scene(rng, color=self.color, shape=self.shape, motion=self.motion, background=self.background)


PHRASES = (
    Phrase("a purple star going up, brown backdrop", "purple", "star", "moves up", "brown"),
    Phrase("blue square, rotating slowly, white background", "blue", "square", "spins", "white"),
    Phrase("The yellow triangle is getting bigger against gray", "yellow", "triangle", "grows", "gray"),
    Phrase("a red ball rolling to the right over black", "red", "circle", "moves right", "black"),
    Phrase("green circle shrinking down to a small dot, background white", "green", "circle", "shrinks", "white"),
    Phrase("on a brown wall, an orange square that stands still", "orange", "square", "stays still", "brown"),
    Phrase("cyan star flying left across a black sky", "cyan", "star", "moves left", "black"),
    Phrase("white triangle, falling down, with gray behind it", "white", "triangle", "moves down", "gray"),
    Phrase("I want to see a purple circle move down on white", "purple", "circle", "moves down", "white"),
    Phrase("video: a green star turning around, black", "green", "star", "spins", "black"),
    Phrase("a big yellow star slowly growing, brown background", "yellow", "star", "grows", "brown"),
    Phrase("an orange triangle shifts leftward. The background is black.", "orange", "triangle", "moves left", "black"),
    Phrase("Static red square on gray", "red", "square", "stays still", "gray"),
    Phrase("spinning white square, brown background", "white", "square", "spins", "brown"),
    Phrase("a blue disc rises on a white canvas", "blue", "circle", "moves up", "white"),
    Phrase("A small cyan triangle becomes smaller and smaller on brown", "cyan", "triangle", "shrinks", "brown"),
    Phrase("brown background; in the middle a motionless green triangle", "green", "triangle", "stays still", "brown"),
    Phrase("black backdrop, red star moving to the left side", "red", "star", "moves left", "black"),
    Phrase("make an orange circle go right with a gray background", "orange", "circle", "moves right", "gray"),
    Phrase("purple square which is moving upward, set on a black background", "purple", "square", "moves up", "black"),
    Phrase("there is a white star; it shrinks; the background is brown", "white", "star", "shrinks", "brown"),
    Phrase("a square in blue, sliding right, on white", "blue", "square", "moves right", "white"),
    Phrase("gray background with a cyan circle that expands", "cyan", "circle", "grows", "gray"),
    Phrase("an unmoving purple triangle, plain white background", "purple", "triangle", "stays still", "white"),
    Phrase("a red triangle rotates in the center of a black screen", "red", "triangle", "spins", "black"),
    Phrase("star (yellow), heading downwards, gray", "yellow", "star", "moves down", "gray"),
    Phrase("green box getting larger over time, white", "green", "square", "grows", "white"),
    Phrase("Orange star does not move, on a black background!", "orange", "star", "stays still", "black"),
    Phrase("the circle is red, the backdrop is brown, and it goes to the left", "red", "circle", "moves left", "brown"),
    Phrase("blue triangle ascending on gray", "blue", "triangle", "moves up", "gray"),
    Phrase("yellow square, getting ever smaller, all of it on brown", "yellow", "square", "shrinks", "brown"),
    Phrase(
        "A cyan square moves from the left to the right on a white background", "cyan", "square", "moves right", "white"
    ),
)
