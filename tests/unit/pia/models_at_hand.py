"""Models of PIA in folders of tests, made of the tiny checkpoint, and requests for them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.plans import Plan
from pyramid_serve.api.requests import parse_request
from pyramid_serve.pia.family import FAMILY
from pyramid_serve.served_model import ServedModel
from tests.unit.pia.golden import CHECKPOINT


def picture_file(width: int = 16, height: int = 8, *, orientation: int = 1) -> bytes:
    """A JPEG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, format="JPEG", exif=exif)
    return content.getvalue()


def with_settings(folder: Path, **settings: Any) -> Path:
    """A folder with nothing but a ``pyramid_serve.json``, whose base is the tiny checkpoint unless another is given."""
    folder.mkdir(exist_ok=True)
    fields = {"base": str(CHECKPOINT), "motion_adapter": str(CHECKPOINT / "motion_adapter"), **settings}
    (folder / "pyramid_serve.json").write_text(json.dumps(fields))
    return folder


def copied(folder: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(CHECKPOINT, folder / "model"))


def change(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def plan_of(source: Path = CHECKPOINT, *, limits: RequestLimits | None = None, **fields: Any) -> Plan:
    """The plan of a request with a picture."""
    model = ServedModel("pia", FAMILY, FAMILY.capabilities(source, None), limits or RequestLimits())
    return model.plan(parse_request({"prompt": "a cat", "input_reference": picture_file(), "seed": 1, **fields}))
