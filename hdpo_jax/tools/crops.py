"""Calls that need no interpreter: one expression that crops or resizes a prompt image by literal numbers.

Visual agents ask for little else, and starting an interpreter costs a hundred times what a crop does. Nothing that the
policy wrote is run: the expression is read, and numbers are all that is taken from it. Whatever is not exactly of this
form, would fail, or could depend on what a session did before is left to a session.
"""

import ast
import functools
from collections.abc import Sequence

from PIL import Image

from hdpo_jax.tools.kernel.pictures import MAX_PIXELS, opened

MAX_CODE = 500
"""Characters; longer code is not looked at."""
MAX_CACHED_PIXELS = 1 << 22
NAME = "image_"

_Steps = list[tuple[str, list[int]]]


def cropped(code: str, images: Sequence[bytes]) -> Image.Image | None:
    """What a fresh session with these images would show for `code`; None when it takes a session to tell."""
    found = _steps(code)
    if found is None:
        return None
    number, steps = found
    if not 1 <= number <= len(images):
        return None
    try:
        image = _decoded(images[number - 1])
    except Exception:
        return None
    for step in steps:
        match step:
            case "crop", [left, upper, right, lower] if left < right and upper < lower:
                size = (right - left) * (lower - upper)
                change = functools.partial(image.crop, (left, upper, right, lower))
            case "resize", [width, height] if width > 0 and height > 0:
                size = width * height
                change = functools.partial(image.resize, (width, height))
            case _:
                return None
        if size > MAX_PIXELS:
            return None
        image = change()
    return image


def _steps(code: str) -> tuple[int, _Steps] | None:
    """The image's number and the methods called on it, in order: `image_1.crop((0, 0, 8, 8)).resize((64, 64))`."""
    if len(code) > MAX_CODE or not code.lstrip().startswith(NAME):
        return None
    try:
        node = ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    steps: _Steps = []
    while isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Attribute) or len(node.args) != 1 or node.keywords:
            return None
        numbers = _integers(node.args[0])
        if numbers is None:
            return None
        steps.append((node.func.attr, numbers))
        node = node.func.value
    number = node.id.removeprefix(NAME) if isinstance(node, ast.Name) else ""
    if not steps or not (number.isascii() and number.isdecimal()) or number.startswith("0") or len(number) > 3:
        return None
    return int(number), steps[::-1]


def _integers(node: ast.expr) -> list[int] | None:
    """The items of a tuple or list of integer literals."""
    if not isinstance(node, ast.Tuple | ast.List):
        return None
    numbers: list[int] = []
    for item in node.elts:
        sign, value = 1, item
        if isinstance(item, ast.UnaryOp) and isinstance(item.op, ast.USub):
            sign, value = -1, item.operand
        if not isinstance(value, ast.Constant) or type(value.value) is not int or value.value > 1 << 24:
            return None
        numbers.append(sign * value.value)
    return numbers


def _decoded(data: bytes) -> Image.Image:
    """Decoded once for all rollouts of a prompt, unless it is large."""
    image = opened(data)
    return _kept(data) if image.width * image.height <= MAX_CACHED_PIXELS else image


@functools.lru_cache(maxsize=64)
def _kept(data: bytes) -> Image.Image:
    image = opened(data)
    # Threads share it from now on; reading a loaded image is safe.
    image.load()
    return image
