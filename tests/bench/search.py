"""What searches of the embedded indices cost and find: documents of words as frequent as in a language (Zipf), and
images that were compressed, scaled or cut. Beside the query's bounds stand queries that rank every match, beside the
fingerprints of parts one fingerprint an image.

python -m tests.bench.search [documents] [images]
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from hdpo_jax.tools import Subject
from hdpo_jax.tools.search import text_index
from hdpo_jax.tools.search.documents import Document
from hdpo_jax.tools.search.fingerprints import NEAR, WHOLE, distances, fingerprints
from hdpo_jax.tools.search.image_index import ImageIndex, index_images
from hdpo_jax.tools.search.text_index import TextIndex, write_index
from hdpo_jax.tools.search.thumbnails import picture as decoded
from tests.bench.table import Row, markdown
from tests.tools.search.pictures import cut, file_of, picture

VOCABULARY = 200_000
QUERIES = 40


def main(documents: int, images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [*texts(Path(folder), documents), *pictures(Path(folder), images)]
    print(markdown(rows))


def texts(folder: Path, count: int) -> Iterator[Row]:
    random = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(VOCABULARY)])
    shares = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    shares /= shares[-1]

    def library() -> Iterator[Document]:
        for _ in range(count):
            drawn = words[np.searchsorted(shares, random.random(int(random.integers(65, 185))))]
            yield Document(title=" ".join(drawn[:5]), link="", text=" ".join(drawn[5:]))

    documents = list(library())
    path = folder / "texts.sqlite"
    start, used = time.perf_counter(), time.process_time()
    write_index(path, documents)
    yield Row(f"index of {count:,} documents of 120 words, documents/s", count / (time.perf_counter() - start))
    yield Row("the same in a second of CPU time", count / (time.process_time() - used))
    yield Row("size of the index", path.stat().st_size / 1e6, unit="MB")
    index = TextIndex(str(path))
    kinds: dict[str, Callable[[], list[str]]] = {
        "5 rare words": lambda: list(random.choice(words[500:5_000], 5)),
        "2 rare and 6 common words": lambda: [*random.choice(words[500:5_000], 2), *random.choice(words[:60], 6)],
        "10 common words": lambda: list(random.choice(words[:60], 10)),
    }
    for name, draw in kinds.items():
        queries = [" ".join(draw()) for _ in range(QUERIES)]
        ours = timed(index, queries)
        with mock.patch.object(text_index, "RANKED", 2**31):
            peer = timed(index, queries[: QUERIES // 5])
        for share, what in ((50, "median"), (95, "95th percentile")):
            mine, theirs = float(np.percentile(ours, share)), float(np.percentile(peer, share))
            yield Row(f"query of {name}, {what}", mine, theirs, theirs / mine, unit="ms")
    index.close()


def timed(index: TextIndex, queries: list[str]) -> list[float]:
    """Milliseconds that each query takes."""
    taken = []
    for query in queries:
        start = time.perf_counter()
        index.search(query, 10)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 30": lambda image: file_of(image, "JPEG", quality=30),
    "half the size": lambda image: file_of(image.resize((image.width // 2, image.height // 2))),
    "stretched by a fifth": lambda image: file_of(image.resize((image.width, int(0.8 * image.height)))),
    "each side cut by 2 %": lambda image: file_of(cut(image, 0.02, 0.02, 0.02, 0.02)),
    "each side cut by 5 %": lambda image: file_of(cut(image, 0.05, 0.05, 0.05, 0.05)),
    "each side cut by 10 %": lambda image: file_of(cut(image, 0.1, 0.1, 0.1, 0.1)),
    "one side cut by 10 %": lambda image: file_of(cut(image, 0.1, 0, 0, 0)),
    "one side cut by 15 %": lambda image: file_of(cut(image, 0.15, 0, 0, 0)),
}


def pictures(folder: Path, count: int) -> Iterator[Row]:
    (folder / "images").mkdir()
    for seed in range(count):
        (folder / "images" / f"{seed}.png").write_bytes(file_of(picture(seed)))
    start = time.perf_counter()
    index_images(folder / "images", folder / "images.sqlite")
    yield Row(f"index of {count:,} images of 0.06 megapixels, images/s", count / (time.perf_counter() - start))
    index = ImageIndex(str(folder / "images.sqlite"))
    single = [fingerprints(picture(seed), [WHOLE]) for seed in range(count)]
    plain = np.stack([found for found in single if found is not None])
    random = np.random.default_rng(0)
    changes = dict(CHANGES)
    changes["sides cut by up to 5 %"] = lambda image: file_of(cut(image, *random.uniform(0, 0.05, 4)))
    changes["sides cut by up to 10 %"] = lambda image: file_of(cut(image, *random.uniform(0, 0.1, 4)))
    for name, change in changes.items():
        files = [change(picture(seed)) for seed in range(count)]
        found = [[match.title for match in index.search(Subject(images=[file]), 10)] for file in files]
        prints = [fingerprints(decoded(file), [WHOLE]) for file in files]
        one = [each is not None and distances(plain, each[0])[seed] <= NEAR for seed, each in enumerate(prints)]
        share = 100 * sum(str(seed) in titles for seed, titles in enumerate(found)) / count
        yield Row(f"found again: {name}", share, 100 * sum(one) / count, unit="%")
    strangers = [index.search(Subject(images=[file_of(picture(count + seed))]), 10) for seed in range(count)]
    yield Row("found, but never indexed", 100 * sum(bool(matches) for matches in strangers) / count, unit="%")
    index.close()
    million = random.integers(0, 2**64, (1_000_000, *plain.shape[1:2], 2), np.uint64)
    start = time.perf_counter()
    distances(million, million[0, 0])
    yield Row("comparing with 1,000,000 fingerprints", (time.perf_counter() - start) * 1e3, unit="ms")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given + [200_000, 200][len(given) :]))
