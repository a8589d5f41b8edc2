"""IPython's shell for one session: runs code, collects what it prints and every image that it shows."""

import ast
import base64
import io
import math
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import PIL
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from traitlets import Type
from traitlets.config import Config

from .output import Output
from .pictures import CALL_PIXELS, MAX_PIXELS, opened, rgb

CELL = "<cell "

_system = os.system


class Pictures(NamedTuple):
    """What a call shows."""

    pictures: list[tuple[tuple[int, int], bytes]]
    """Width and height of each; RGB pixels, row by row."""
    dropped: int
    """Images beyond the bounds, not returned."""


class Reply(NamedTuple):
    """What one call gives back."""

    text: str
    ok: bool
    """False when the code raised."""
    shown: Pictures


class Gallery:
    """The images that a call shows, in order, as RGB pixels."""

    def __init__(self, limit: int):
        self._limit = limit
        self._shown = Pictures([], 0)
        self._pixels = 0

    def take(self) -> Pictures:
        """What was shown since the last call of this method; threads may go on showing."""
        shown, self._shown, self._pixels = self._shown, Pictures([], 0), 0
        return shown

    def add(self, picture: Any) -> bool:
        """Keeps a copy of a picture; False when it is none (PIL image or matplotlib figure)."""
        if not isinstance(picture, Image.Image | matplotlib.figure.Figure):
            return False
        if len(self._shown.pictures) >= self._limit:
            self._drop()
            return True
        image = picture if isinstance(picture, Image.Image) else _drawn(picture)
        width, height = image.size
        if width * height > MAX_PIXELS:
            scale = math.sqrt(MAX_PIXELS / (width * height))
            image = image.resize((max(int(width * scale), 1), max(int(height * scale), 1)), reducing_gap=2.0)
        if image.width * image.height == 0:
            raise ValueError(f"the image to show is empty: {width}x{height} pixels")
        if self._pixels + image.width * image.height > CALL_PIXELS:
            self._drop()
            return True
        image = rgb(image)
        self._shown.pictures.append((image.size, image.tobytes()))
        self._pixels += image.width * image.height
        return True

    def _drop(self) -> None:
        self._shown = self._shown._replace(dropped=self._shown.dropped + 1)


def _drawn(figure: matplotlib.figure.Figure) -> Image.Image:
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()))


class _Compiler(CachingCompiler):
    """Names code `<cell 1>`, `<cell 2>`…: tracebacks point to what the model wrote."""

    cells = 0

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        self.cells += 1
        return f"{CELL}{self.cells}>"


class _Hook(DisplayHook):
    """Prints the value of a last expression, or keeps it when it is an image."""

    def __call__(self, result: Any = None) -> None:
        shell: Any = self.shell
        if result is None or shell.quiet:
            return
        shell.user_ns["_"] = result
        if not shell.gallery.add(result):
            print(shell.plain(result))


class _Formatter(DisplayFormatter):
    def format(self, obj: Any, include: Any = None, exclude: Any = None) -> Any:
        shell: Any = self.parent
        if shell.gallery.add(obj):
            # Empty: `display` has nothing left to do.
            return {}, {}
        return super().format(obj, include=include, exclude=exclude)


class _Publisher(DisplayPublisher):
    """Objects that draw themselves arrive here as files."""

    def publish(self, data: Any, metadata: Any = None, *_: Any, **__: Any) -> None:
        shell: Any = self.shell
        for kind in ("image/png", "image/jpeg"):
            if kind in data:
                content = data[kind]
                content = base64.b64decode(content) if isinstance(content, str) else content
                shell.gallery.add(Image.open(io.BytesIO(content)))
                return
        if "text/plain" in data:
            print(data["text/plain"])


class Shell(InteractiveShell):
    """One interpreter. Made once, in the fork server; a session is a fork of it."""

    compiler_class = Type(_Compiler)
    displayhook_class = Type(_Hook)
    display_pub_class = Type(_Publisher)

    def __init__(self, **settings: Any):
        self.gallery = Gallery(0)
        self.quiet = False
        super().__init__(**settings)

    def init_display_formatter(self) -> None:
        self.display_formatter = _Formatter(parent=self)

    def plain(self, value: Any) -> str:
        """What an interactive interpreter would print for a value."""
        formatter: Any = self.display_formatter
        return formatter.formatters["text/plain"](value)

    def system(self, cmd: str) -> None:
        sys.stdout.flush()
        self.user_ns["_exit_code"] = _system(self.var_expand(cmd, depth=1))

    def enable_gui(self, gui: Any = None) -> None:
        """There is no screen."""

    def enable_matplotlib(self, gui: Any = None) -> Any:
        """`%matplotlib inline` is how it works already."""
        return "agg", "agg"

    def ask_exit(self) -> None:
        """A session ends when its trajectory does."""

    def showtraceback(self, exc_tuple: Any = None, *_: Any, **__: Any) -> None:
        kind, error, trace = exc_tuple or sys.exc_info()
        print(_explained(kind, error, trace), end="")

    def showsyntaxerror(self, filename: Any = None, running_compiled_code: bool = False) -> None:
        self.showtraceback()


def _explained(kind: Any, error: Any, trace: Any) -> str:
    """A traceback that starts in the model's own code."""
    own = trace
    while own is not None and not own.tb_frame.f_code.co_filename.startswith(CELL):
        own = own.tb_next
    explained = traceback.TracebackException(kind, error, own, compact=True)
    explained.stack[:] = [frame for frame in explained.stack if frame.filename != __file__]
    return "".join(explained.format())


class Session:
    """Runs the calls of one session, one after the other."""

    def __init__(self, *, output_chars: int, max_images: int):
        settings = Config()
        settings.HistoryManager.enabled = False
        settings.InteractiveShell.cache_size = 0
        settings.InteractiveShell.colors = "nocolor"
        self._shell = Shell.instance(config=settings)
        # `display` and `get_ipython` are there for good.
        self._shell.builtin_trap.activate()
        self._output_chars = output_chars
        self._gallery = self._shell.gallery = Gallery(max_images)
        self._output = self._redirected()
        self._calls = 0
        self._running = False
        # IPython's advice on how to leave it.
        warnings.filterwarnings("ignore", message="To exit: use")
        plt.show = self._show_figures

        def shown(picture: Any, *_: Any, **__: Any) -> None:
            self._gallery.add(picture)

        figures: Any = matplotlib.figure.Figure
        pictures: Any = Image.Image
        figures.show = pictures.show = shown

    def warm_up(self) -> None:
        """Loads and fills, before the fork, what the first calls of every session would otherwise do."""
        self.start(())
        image = Image.effect_noise((64, 64), 8.0).convert("RGB")
        file = io.BytesIO()
        image.save(file, "JPEG")
        self._shell.user_ns["image_1"] = Image.open(io.BytesIO(file.getvalue()))
        for code in (
            "image_1.crop((0, 0, 32, 32)).resize((64, 64), Image.LANCZOS)",
            "figure, axes = plt.subplots(); axes.imshow(image_1); axes.set_title('$x$'); plt.show()",
            "import sys\nprint(np.asarray(image_1).mean(), [1], file=sys.stderr)\n{'a': 1.5}",
            "def f():\n    return undefined\nf()",
            "%who",
            "x = = 1",
        ):
            self.run(code)
        plt.close("all")
        compiler: Any = self._shell.compile
        compiler.cells = 0
        self._calls = 0
        self._shell.reset(new_session=False)

    def start(self, images: Sequence[bytes | bytearray]) -> None:
        """A fresh namespace with `image_1`… from the original files, decoded when they are first used.

        Random generators start the same in every session: what code does depends on the code and the images alone.
        """
        random.seed(0)
        np.random.seed(0)
        self._output.release()
        self._output = self._redirected()
        names: dict[str, Any] = {"np": np, "numpy": np, "math": math, "matplotlib": matplotlib, "plt": plt}
        names |= {"PIL": PIL, "Image": Image, "ImageDraw": ImageDraw, "ImageEnhance": ImageEnhance}
        names |= {"ImageFilter": ImageFilter, "ImageFont": ImageFont, "ImageOps": ImageOps}
        for number, data in enumerate(images, start=1):
            try:
                names[f"image_{number}"] = opened(data)
            except Exception as error:
                print(f"image_{number} is missing: {str(error) or type(error).__name__}")
        self._shell.user_ns.update(names)

    def run(self, code: str) -> Reply:
        """Runs one cell. Never raises, whatever the code does, short of ending the process."""
        if self._calls:
            self._output.mark_late()
        self._calls += 1
        self._shell.quiet = code.rstrip().endswith(";")
        signal.signal(signal.SIGINT, self._interrupt)
        sys.stdout = sys.stderr = self._output
        ok = False
        try:
            self._running = True
            ok = self._execute(code)
            self._running = False
        except BaseException as error:
            self._running = False
            print(_explained(type(error), error, error.__traceback__), end="", file=self._output)
        return Reply(self._output.take(), ok, self._gallery.take())

    def _execute(self, code: str) -> bool:
        """Runs plain Python directly, the rest (magics, `!`, top-level await, errors) the way of IPython.

        The direct way takes half the time, and touches a third fewer of the pages that a fresh fork has to copy.
        """
        compiler: Any = self._shell.compile
        name = f"{CELL}{compiler.cells + 1}>"
        try:
            body, last = ast.parse(code).body, None
            if body and isinstance(body[-1], ast.Expr):
                last = ast.Expression(body[-1].value)
                del body[-1]
            statements = compile(ast.Module(body, []), name, "exec", dont_inherit=True)
            value = compile(last, name, "eval", dont_inherit=True) if last else None
        except Exception:
            return bool(self._shell.run_cell(code, store_history=False).success)
        compiler.cache(code)
        namespace = self._shell.user_ns
        try:
            exec(statements, namespace)
            if value is not None:
                self._shell.displayhook(eval(value, namespace))
        except BaseException:
            self._shell.showtraceback()
            return False
        return True

    def _interrupt(self, *_: Any) -> None:
        # Between two calls there is nothing to interrupt: the answer was on its way when the host gave up.
        if self._running:
            raise KeyboardInterrupt

    def _show_figures(self, *_: Any, **__: Any) -> None:
        """`plt.show()`: every open figure, then they are closed."""
        for number in plt.get_fignums():
            self._gallery.add(plt.figure(number))
        plt.close("all")

    def _redirected(self) -> Output:
        """Descriptors 1 and 2, which subprocesses inherit, write to a nameless file in the session's own folder.

        The file of the fork server's warm-up, which all sessions inherit, is closed: it would be a way between them.
        """
        path = "output"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        os.unlink(path)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        output = sys.stdout = sys.stderr = Output(self._output_chars, descriptor)
        return output
