"""What tool servers and trainers say to each other: the format of the authors' release, and a few fields of our own.

Ours are marked; a server or trainer that does not know them leaves them out, and everything works without.
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hdpo_jax.tools.kernel.pictures import MAX_PIXELS, rgb
from hdpo_jax.types import data_keys
from models.qwen3_vl.pixels import load_image

PATH = "/get_observation"
TOKEN = "HDPO_TOOLS_TOKEN"
"""The environment variable with the bearer token, on both sides."""
MAX_NAME = 256
"""Characters of a trajectory's id or a call's."""
FORMATS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
"""Image files that are taken, and their media types; decoders of rarer ones are left alone."""
IMAGE_MARK = "<image>"
"""Where an image belongs, in texts of the authors' server."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]


def _list(value: Any) -> Any:
    """Trainers of the same family close a trajectory by its bare name."""
    return [value] if isinstance(value, str) else value


class ExtraFields(BaseModel):
    """What goes with an action, among whatever else the data set says of the prompt."""

    model_config = ConfigDict(extra="allow")

    images: list[str] | None = None
    """The prompt's images as data URIs: at a trajectory's first call, later ones may leave them out."""
    keys: list[str] | None = None
    """Ours: names under which data sets know the prompt, the likeliest first."""
    opened: bool = False
    """Ours: the trajectory has called before, so where it is not known its state is lost."""

    def names(self) -> list[str]:
        return data_keys(self.model_extra or {}) if self.keys is None else self.keys


class ActionBatch(BaseModel):
    """The body of a request: lists of the same length."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    trajectory_ids: Annotated[list[Name], BeforeValidator(_list)] = Field(min_length=1)
    actions: list[str]
    """Each an assistant's turn up to `</tool_call>`; the last tool call in it is meant."""
    extra_fields: list[ExtraFields | None] | None = None
    finish: list[bool] | None = None
    """True: the trajectory is over, and its action is not run."""
    is_last_step: list[bool] | None = None
    call_ids: list[Name | None] | None = None
    """Ours: a call that is sent again under its name runs once, and is answered as the first time."""

    @model_validator(mode="after")
    def _same_lengths(self) -> "ActionBatch":
        expected = len(self.trajectory_ids)
        for name in ("actions", "extra_fields", "finish", "is_last_step", "call_ids"):
            found = getattr(self, name)
            if found is not None and len(found) != expected:
                raise ValueError(f"{name} has {len(found)} entries, and trajectory_ids has {expected}")
        return self


class ObservationMessage(BaseModel):
    """One observation."""

    obs: str
    image: Annotated[list[str], BeforeValidator(_list)] = []
    metrics: dict[str, Any] = {}
    """Ours: ok, lost, seconds."""
    timeout: bool = False


class ObservationBatch(BaseModel):
    """The body of an answer. The authors' server gives a bare text where an action holds no tool call."""

    observations: list[ObservationMessage | str]
    dones: list[bool]
    valids: list[bool]
    """Whether there was something to run: what ran and failed is valid."""
    processing_time_ms: float = 0.0

    @model_validator(mode="after")
    def _same_lengths(self) -> "ObservationBatch":
        if not len(self.observations) == len(self.dones) == len(self.valids):
            raise ValueError("observations, dones and valids differ in length")
        return self


class Health(BaseModel):
    """What a server says of itself; the authors' says other things, and so the defaults are what it can."""

    status: str = ""
    sessions: int = 0
    queue: int = 0
    tools: list[str] = []
    call_ids: bool = False
    """Whether calls may be repeated under their name."""


def problem(error: ValidationError) -> str:
    """What is wrong with a body, in one line that repeats little of it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][:4]).lstrip(".")
    said = first["msg"].removeprefix("Value error, ")[:200]
    return " ".join((f"{place[:80]}: {said}" if place else said).split())


def data_uri(file: bytes) -> str:
    """A prompt's image file as it goes over the wire: as it is, or as PNG where servers would not take it."""
    try:
        with _opened(file) as image:
            # What Pillow names otherwise is a kind of JPEG, as phones write it.
            media = FORMATS.get(image.format or "", FORMATS["JPEG"])
    except ValueError:
        return image_uri(load_image(file))
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def image_uri(image: Image.Image) -> str:
    """An observation's image as it goes over the wire: its exact pixels."""
    file = io.BytesIO()
    # Networks between servers are fast: the lowest level takes a third of the time.
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_file(uri: str, max_bytes: int) -> bytes:
    """The file in a data URI, its header checked and nothing decoded. Raises ValueError in words."""
    head, comma, encoded = uri.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ValueError("is no data URI; expected data:image/png;base64,…")
    # Before the bytes are made.
    if len(encoded) // 4 * 3 > max_bytes + 2:
        raise ValueError(f"is larger than {max_bytes:,} bytes")
    try:
        file = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is no base64") from None
    with _opened(file):
        return file


def decoded_image(uri: str, max_bytes: int) -> Image.Image:
    """An observation's image: RGB, of bounded size. Raises ValueError in words."""
    with _opened(image_file(uri, max_bytes)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"has {image.width}x{image.height} pixels; expected {MAX_PIXELS:,} at most")
        try:
            image.load()
            return rgb(image)
        except Exception as error:
            # What decoders raise for broken files is not a closed set.
            raise ValueError(f"can not be decoded: {type(error).__name__}") from None


def observed(message: ObservationMessage | str) -> ObservationMessage:
    """An observation in its full form."""
    return ObservationMessage(obs=message) if isinstance(message, str) else message


def without_marks(text: str, images: Sequence[str]) -> str:
    """The text of an authors' server without the places of its images, which are put in by whoever builds the turn."""
    return text.replace(IMAGE_MARK, "") if images else text


def succeeded(valid: bool, metrics: Mapping[str, Any]) -> bool:
    """Whether a call did what it should, as far as either kind of server tells."""
    told = (metrics.get(name) for name in ("ok", "code_success", "search_success"))
    return valid and next((value for value in told if isinstance(value, bool)), True)


def _opened(file: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file), formats=tuple(FORMATS))
    except Image.DecompressionBombError:
        raise ValueError("has too many pixels") from None
    except Exception:
        raise ValueError(f"is no image file; expected one of {', '.join(FORMATS)}") from None
