"""Settings of the built-in task: what its boards look like, how many there are, how the cold start behaves."""

import hashlib
import itertools
from dataclasses import dataclass

from hdpo_jax.config import ConfigError
from hdpo_jax.data.signs_families import DOTS, QUESTIONS


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"signs.{name} is {found!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ColdStartPhase:
    """How the conversations of one cold-start file behave."""

    conversations: int
    tool_share_legible: float
    """Share of the legible boards that are answered through the tool, although that is redundant."""
    tool_share_illegible: float
    """The same of the illegible ones. Without the tool the answer there is a guess, and nearly always wrong."""
    misplaced_share: float = 0.0
    """Share of the calls that crop a wrong place; a guess follows, whether the board is legible or not."""

    def __post_init__(self):
        _require(self.conversations > 0, "cold_start.conversations", self.conversations, "at least 1")
        for name in ("tool_share_legible", "tool_share_illegible", "misplaced_share"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"cold_start.{name}", share, "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SignsConfig:
    """What the boards look like and how many there are."""

    cold_start: tuple[ColdStartPhase, ...] = (
        ColdStartPhase(conversations=6_144, tool_share_legible=0.2, tool_share_illegible=0.9),
        ColdStartPhase(conversations=2_048, tool_share_legible=0.975, tool_share_illegible=1.0, misplaced_share=0.10),
    )
    """One file each: the first teaches reading and the tool, the second the reflex of calling it."""
    train_boards: int = 2_048
    test_boards: int = 1_024
    families: tuple[str, ...] = ("read",)
    letters: str = "AEGMRSTUVWXZ"
    """Capitals that stay apart at 7 px in every font."""
    length: int = 3
    """Letters of an inscription."""
    held_out_share: float = 0.125
    """Share of the possible inscriptions that only the test boards show."""
    legible_share: float = 0.5
    shapes: tuple[tuple[int, int], ...] = ((512, 512), (640, 384), (384, 640))
    """Widths and heights of boards, px."""
    cell: int = 128
    """Side of the squares in whose middle signs stand, px."""
    jitter: float = 0.5
    """How far a sign may stand off that middle, in px as the policy reads it: large signs, seen reduced, more."""
    legible_height: tuple[float, float] = (52.0, 56.0)
    """Range of the height of the letters, px."""
    illegible_height: tuple[float, float] = (7.0, 8.0)
    plate: tuple[int, int] = (56, 32)
    """Width and height of the plate behind illegible letters, px."""
    contrast: tuple[float, float] = (100.0, 170.0)
    """Range of the difference between letters and plate, grey levels."""
    noise: float = 5.0
    """Standard deviation of the sensor noise, grey levels."""
    quality: int = 90
    """Of the JPEG."""
    crop: tuple[int, int] = (48, 16)
    """Width and height of the crops in cold-start conversations, px. They lie in the middle of a cell, so that there
    are few different numbers to learn, and letters fall on the patches of a crop as they do on those of a board."""

    def __post_init__(self):
        _require(len(self.cold_start) > 0, "cold_start", self.cold_start, "at least one phase")
        for name in ("train_boards", "test_boards", "length", "cell"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        known = set(self.families) <= set(QUESTIONS) and len(self.families) > 0
        _require(known, "families", self.families, f"some of {', '.join(QUESTIONS)}")
        capitals = all("A" <= letter <= "Z" for letter in self.letters)
        letters = capitals and len(self.letters) == len(set(self.letters)) > 0
        _require(letters, "letters", self.letters, "different capitals A to Z")
        _require(0 < self.held_out_share < 1, "held_out_share", self.held_out_share, "a share between 0 and 1")
        _require(0 <= self.legible_share <= 1, "legible_share", self.legible_share, "a share from 0 to 1")
        for width, height in self.shapes:
            fits = 3 * self.cell <= min(width, height) and max(width, height) <= 1024
            _require(fits, "shapes", (width, height), f"sides from three cells ({3 * self.cell}) to 1024")
        for name, value, sizes, margin in (
            ("legible_height", self.legible_height, self.shapes, 64.0),
            ("illegible_height", self.illegible_height, (self.crop,), 2 * self.jitter),
        ):
            # The widest capital takes 1.6 times its height, spacing included.
            room = min((width - margin) / (1.6 * self.length) for width, _ in sizes)
            room = min(room, *(height - margin for _, height in sizes))
            _require(value[1] <= room, name, value, f"at most {room:.1f} px, so that {self.length} letters fit")
        both = all(self._leaves_inscriptions_to_both_sides(family) for family in self.families)
        _require(both, "held_out_share", self.held_out_share, "a share that leaves inscriptions to both sides")

    def alphabet(self, family: str) -> str:
        """What the inscriptions of a family are made of."""
        return DOTS if family == "count" else self.letters

    def _leaves_inscriptions_to_both_sides(self, family: str) -> bool:
        some = itertools.islice(itertools.product(self.alphabet(family), repeat=self.length), 10_000)
        return len({is_held_out("".join(text), self) for text in some}) == 2


def is_held_out(inscription: str, config: SignsConfig) -> bool:
    """Whether only test boards may show this inscription: decided by its hash, so the same for every seed."""
    # Not a CRC: being linear, it would hold out whole patterns of letters.
    digest = hashlib.blake2b(inscription.encode(), digest_size=4).digest()
    return int.from_bytes(digest) < config.held_out_share * 2**32
