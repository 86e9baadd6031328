"""The variants of a Pyramid Flow checkpoint: its ``diffusion_transformer_*`` folders, each with a transformer.

The layout is the published one: ``causal_video_vae/``, one or more ``diffusion_transformer_*/``, ``text_encoder*/`` and
``tokenizer*/``.
"""

from pathlib import Path

from pyramid_serve.checkpoints.naming import there
from pyramid_serve.checkpoints.sources import CheckpointError, Source, resolve

VARIANT_PREFIX = "diffusion_transformer_"
_PREFERRED_VARIANT = VARIANT_PREFIX + "768p"


def variants(source: Source) -> list[str]:
    """Names of the checkpoint's ``diffusion_transformer_*`` folders, sorted. Fetches no weights."""
    folder = resolve(source)
    return sorted(config.parent.name for config in folder.glob(f"{VARIANT_PREFIX}*/config.json"))


def choose_variant(source: Source, variant: str | None = None) -> str:
    """The full name of a variant that is there. Fetches no weights.

    ``variant`` may leave the prefix out: ``384p`` for ``diffusion_transformer_384p``. Without one it is the 768p
    variant where there is one, else the only one. Raises ``CheckpointError`` listing those that are there.
    """
    names = variants(source)
    if not names:
        present = sorted(entry.name for entry in resolve(source).iterdir())
        raise CheckpointError(f"{source}: no checkpoint: looked for {VARIANT_PREFIX}*/config.json{there(present)}")
    if variant is None:
        if _PREFERRED_VARIANT in names:
            return _PREFERRED_VARIANT
        if len(names) == 1:
            return names[0]
        raise CheckpointError(f"{source}: choose a variant: {', '.join(names)}")
    for name in names:
        if variant in (name, name.removeprefix(VARIANT_PREFIX)):
            return name
    raise CheckpointError(f"{source}: no variant {variant!r}; there are {', '.join(names)}")


def transformer_folder(source: Source, variant: str | None = None) -> Path:
    """The local folder of one transformer, fetched alone; its ``name`` is the variant. See ``choose_variant``."""
    name = choose_variant(source, variant)
    return resolve(source, parts=[name]) / name
