"""`hdpo data index` and `hdpo data index-images`: how far they are, and what came of it."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hdpo_jax.tools.search.documents import LeftOut, document_files
from hdpo_jax.tools.search.image_index import image_files, index_images
from hdpo_jax.tools.search.text_index import index_documents


def build_text_index(documents: Path, output: Path) -> None:
    """Writes the index of JSON lines files, with a progress bar. Raises DataError."""
    size = sum(path.stat().st_size for path in document_files(documents))
    console, start = Console(stderr=True), time.perf_counter()
    columns = (TextColumn("indexing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("indexing", total=size)
        count, left_out = index_documents(documents, output, lambda read: progress.advance(task, read))
    _tell(console, output, f"{count:,} documents", left_out, "lines", time.perf_counter() - start)


def build_image_index(images: Path, output: Path) -> None:
    """Writes the index of a folder of images, with a progress bar. Raises DataError."""
    number = len(image_files(images))
    console, start = Console(stderr=True), time.perf_counter()
    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("indexing", total=number)
        count, left_out = index_images(images, output, lambda read: progress.advance(task, read))
    _tell(console, output, f"{count:,} images", left_out, "files or lines", time.perf_counter() - start)


def _tell(console: Console, output: Path, what: str, left_out: LeftOut, kind: str, seconds: float) -> None:
    """The result on stdout; what was left out on stderr, by name."""
    if left_out.count:
        console.print(f"left out {left_out.count:,} {kind}: {left_out}", markup=False, highlight=False, soft_wrap=True)
    print(f"{output}: {what}, {output.stat().st_size / 1e6:,.1f} MB, in {seconds:,.1f} s")
