"""Rollout dumps as the items of the report page's trajectory browser."""

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAIRS = 120
"""Prompts of an evaluation that the page shows, evenly spread over the file."""
MISTAKES = 40
"""Further ones that the trained policy gets wrong."""
GROUPS = 48
"""Groups of a training run that the page shows, evenly spread over its dumps."""
COLUMNS = 8
"""Rollouts of a group."""
TEXT = 20_000
"""Characters of a turn."""

Record = Mapping[str, Any]
Key = tuple[str, int]
SAFE_IMAGE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


class ImageTable:
    """The page's images, each once; items name them by index."""

    def __init__(self):
        self.uris: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, uri: Any) -> int | None:
        """The index of a data URI of a bitmap; None for anything else."""
        if not isinstance(uri, str) or SAFE_IMAGE.fullmatch(uri) is None:
            return None
        if uri not in self._index:
            self._index[uri] = len(self.uris)
            self.uris.append(uri)
        return self._index[uri]


def read_records(path: Path) -> Iterator[Record]:
    """The trajectories of a dump, one at a time; none where there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}; expected a rollout dump") from error
            yield record


class Outcome(NamedTuple):
    """What the page counts about a trajectory."""

    kind: str
    """"legible" or "illegible" for a sign, the data source for other prompts."""
    called: bool
    correct: bool


def outcomes(path: Path) -> dict[Key, Outcome]:
    """Every trajectory of a dump, in its order, without its text and images."""
    return {
        _key(record): Outcome(_kind(record), bool(record.get("calls")), bool(record.get("correct")))
        for record in read_records(path)
    }


def choose_pairs(before: Mapping[Key, Outcome], after: Mapping[Key, Outcome]) -> tuple[set[Key], str]:
    """Which of the prompts that both sides answered are shown, and a phrase that says so."""
    order = [key for key in after if key in before]
    stride = max(1, -(-len(order) // PAIRS))
    spread = order[::stride]
    wrong = [key for key in order if not after[key].correct and key not in set(spread)][:MISTAKES]
    share = "all" if stride == 1 else f"1 in {stride} of"
    phrase = f"{share} {len(order)} held-out prompts" + (", evenly spread" if stride > 1 else "")
    if wrong:
        phrase += f", and {len(wrong)} more that HDPO gets wrong"
    return {*spread, *wrong}, phrase


def pair_items(before: Path, after: Path, keys: Container[Key], images: ImageTable) -> list[dict[str, Any]]:
    """What the policy did on the same prompts before and after training, side by side."""
    old = {_key(record): record for record in read_records(before) if _key(record) in keys}
    items = []
    for record in read_records(after):
        if _key(record) not in keys:
            continue
        first = old[_key(record)]
        changed = any(first.get(name) != record.get(name) for name in ("correct", "calls"))
        facets = {
            "HDPO answer": "right" if record.get("correct") else "wrong",
            "HDPO calls": "called" if record.get("calls") else "direct",
            "difference": "changed" if changed else "same",
        }
        columns = [_column("Cold start", first, images), _column("HDPO", record, images)]
        items.append(_item(record, columns, images, facets))
    return items


def group_items(dumps: Sequence[tuple[int, Path]], images: ImageTable) -> tuple[list[dict[str, Any]], str]:
    """Groups of training rollouts, side by side, from the dumps of several steps; and which these are."""
    share = max(1, GROUPS // max(1, len(dumps)))
    dumps = dumps[:: max(1, -(-len(dumps) // GROUPS))]
    items = []
    for step, path in dumps:
        groups: dict[Any, list[Record]] = {}
        for record in read_records(path):
            group = record.get("group")
            if group in groups or len(groups) < share:
                groups.setdefault(group, []).append(record)
        for rollouts in groups.values():
            rollouts = sorted(rollouts, key=lambda record: record.get("sample", 0))[:COLUMNS]
            columns = [_column(f"Rollout {1 + i}", record, images) for i, record in enumerate(rollouts)]
            items.append(_item(rollouts[0], columns, images, {"step": str(step), "group": _group_verdict(rollouts)}))
    return items, f"up to {share} groups of each dumped step, up to {COLUMNS} rollouts of each"


def _group_verdict(rollouts: Sequence[Record]) -> str:
    verdicts = [record.get("correct", False) for record in rollouts]
    if None in verdicts:
        return "not judged"
    return "all right" if all(verdicts) else "mixed" if any(verdicts) else "all wrong"


def _kind(record: Record) -> str:
    legible = (record.get("extra") or {}).get("legible")
    if legible is None:
        return str(record.get("data_source", ""))
    return "legible" if legible else "illegible"


def _item(record: Record, columns: Sequence[Record], images: ImageTable, facets: Mapping[str, str]) -> dict[str, Any]:
    truth = record.get("ground_truth", "")
    return {
        "id": str(record.get("prompt_id", "")),
        "truth": truth if isinstance(truth, str) else " or ".join(map(str, truth)),
        "question": _cut(record.get("question")),
        "system": _cut(record.get("system")),
        "images": _indices(record.get("prompt_images"), images),
        "facets": {"prompt": _kind(record), **facets},
        "columns": list(columns),
    }


def _column(label: str, record: Record, images: ImageTable) -> dict[str, Any]:
    rewards = record.get("rewards") or {}
    return {
        "label": label,
        "correct": record.get("correct", False),  # null: it could not be judged
        "calls": record.get("calls", 0),
        "tokens": record.get("tokens", 0),
        "stop": str(record.get("stop", "")),
        "rewards": {name: rewards.get(name) for name in ("accuracy", "tool")},
        "turns": [
            {
                "role": "tool" if turn.get("role") == "tool" else "assistant",
                "text": _cut(turn.get("text")),
                "images": _indices(turn.get("images"), images),
            }
            for turn in record.get("turns", ())
        ],
    }


def _indices(uris: Sequence[Any] | None, images: ImageTable) -> list[int]:
    return [index for index in map(images.add, uris or ()) if index is not None]


def _cut(text: Any) -> str:
    text = str(text or "")
    return text if len(text) <= TEXT else f"{text[:TEXT]} … [{len(text) - TEXT} more characters]"


def _key(record: Record) -> Key:
    return str(record.get("prompt_id")), int(record.get("sample", 0))
