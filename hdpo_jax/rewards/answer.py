"""Is the answer right? Rules that need no judge: same text, multiple choice, quantity, mathematics.

The rules are conservative: what they accept is right, and what they can not tell is left to whoever comes next
(`None`); where nobody does, it counts as wrong.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from hdpo_jax.rewards.mathematics import same_expression

MAX_CHARS = 2_000
"""A longer prediction is wrong, unless the ground truth is about as long."""
RELATIVE_TOLERANCE = 1e-6
ROUNDING = 1e-2
"""Decimal numbers closer than this may be roundings of each other: not for rules to judge."""

_TAG = re.compile(r"<[\s/]*(?:answer|reason|think|tool_call|tool_response|image)\b|<\|", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WRAPPERS = tuple((mark, mark) for mark in ("**", "*", "`", '"', "'", "$$", "$")) + ((r"\(", r"\)"),)
_COMMANDS = (r"\text{", r"\textbf{", r"\mathrm{", r"\boxed{")
_EXCLAMATION = re.compile(r"(?<=[^\W\d_]{2})[!?]+$")
_PREAMBLE = re.compile(
    r"(?:the\s+)?(?:(?:final|correct|best)\s+)?(?:answer|option|choice)(?:\s+is\b\s*:?|\s*[:=])\s*(?=\S)"
    r"|(?:option|choice)\s+(?=\(?[A-J]\b)",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\(([A-J])\)\s*[.:]?\s*(.*)|([A-J])(?:\)\s*|[.:]\s+)(.*)|([A-J])()", re.IGNORECASE | re.DOTALL)
_OTHER_LABEL = re.compile(r"(?<!\w)\(?[A-J](?:[).:,]|\s*$|\s+(?:or|and)\b)|\b(?:or|and)\s+\(?[A-J](?!\w)(?!\s+\w)")
_QUANTITY = re.compile(
    r"([$€£¥]?)\s*([+-]?)\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)((?:\.[0-9]*)?)"
    r"(?:(?:[eE]|\s*(?:×|\*|x|\\times)\s*10\s*\^\s*\{?)([+-]?[0-9]{1,3})\}?)?\s*(\\?%|°|[^\W\d_]{1,12}|)"
)
_UNIT_NAMES = {r"\%": "%", "percent": "%", "degrees": "°", "degree": "°"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞↉]")
_TYPOGRAPHY = str.maketrans(dict.fromkeys("−‐‑‒–—", "-") | dict.fromkeys("⁄∕", "/") | {"“": '"', "”": '"'})
_TYPOGRAPHY |= str.maketrans(dict.fromkeys("‘’", "'"))


def extract_answer(text: str) -> str | None:
    """The text of the last `<answer>…</answer>` that the policy wrote; None without one.

    Answers inside a closed `<reason>` or `<tool_call>` are thoughts and data, not answers. A last answer that is
    not closed, or that stands inside another one, is none: an earlier answer does not take its place.

    Args:
        text: what the policy wrote, all turns; no observations.
    """
    text = _without(_without(text, "<reason>", "</reason>"), "<tool_call>", "</tool_call>")
    start = text.rfind("<answer>")
    if start < 0:
        return None
    is_nested = text.rfind("<answer>", 0, start) > text.rfind("</answer>", 0, start)
    end = text.find("</answer>", start)
    return None if is_nested or end < 0 else text[start + len("<answer>") : end].strip()


def answer_matches(prediction: str | None, ground_truth: str | Sequence[str]) -> bool:
    """Whether the rules accept the prediction for the ground truth, or for any of several."""
    return prediction is not None and judge_by_rules(prediction, ground_truth) is True


def judge_by_rules(prediction: str, ground_truth: str | Sequence[str]) -> bool | None:
    """True: right. False: wrong for certain. None: the rules can not tell.

    - text: equal but for case, white space, Unicode form, quotes and emphasis around it, punctuation at its end;
    - multiple choice: `B`, `(B)`, `B) cat`, `Answer: B` for `B`, and `B) cat` for `cat`; not where another label
      stands beside it, or where label and text disagree;
    - quantities: 1,234 = 1234.0 = 1.234e3 within 1e-6 (whole numbers exactly). A unit, % and a currency sign must stand
      on both sides or on neither, so 50% is neither 50 nor 0.5 here; 007 is a code, not a number;
    - mathematics: math-verify, where both sides look like expressions.
    """
    truths = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    verdicts = []
    for truth in truths:
        verdicts.append(_judge(prediction, truth))
        if verdicts[-1]:
            return True
    return None if None in verdicts else False


def _judge(prediction: str, truth: str) -> bool | None:
    if len(prediction) > max(MAX_CHARS, 4 * len(truth)) or _is_hostile(prediction, truth):
        return False
    guess, right = _clean(prediction), _clean(truth)
    if not guess or not right:
        return False
    if guess.casefold() == right.casefold():
        return True
    guess = _bare(guess)
    if guess.casefold() == right.casefold():
        return True
    for rule in (_judge_choice, _judge_quantity):
        verdict = rule(guess, right)
        if verdict is not None:
            return verdict
    # Two expressions that math-verify can not reconcile may still be the same answer in other words.
    return same_expression(guess, right) or None


def _judge_choice(guess: str, right: str) -> bool | None:
    label, text = _option(guess)
    right_label, right_text = _option(right)
    if right_label and not (right_label.isupper() or right.startswith("(")):
        right_label, right_text = "", ""  # A lone small letter is a variable.
    is_ambiguous = bool(_OTHER_LABEL.search(text))
    if right_label and not right_text:
        return None if not label or is_ambiguous else label.upper() == right_label.upper()
    if right_label and not label:
        return True if _agree(guess, right_text) else None
    if right_label:
        return True if label.upper() == right_label.upper() and (not text or _agree(text, right_text)) else None
    return True if text and _agree(text, right) else None


def _option(text: str) -> tuple[str, str]:
    """The label of a multiple-choice answer and the text behind it; empty where there is none."""
    match = _OPTION.fullmatch(text)
    if match is None:
        return "", ""
    label, rest = (group for group in match.groups() if group is not None)
    return label, rest.strip()


def _agree(text: str, right: str) -> bool:
    return text.casefold() == right.casefold() or bool(_judge_quantity(text, right))


class _Quantity(NamedTuple):
    value: float
    whole: int | None
    """Exact, where it was written as a whole number."""
    unit: tuple[str, str]


def _judge_quantity(guess: str, right: str) -> bool | None:
    left, true = _quantity(guess), _quantity(right)
    if left is None or true is None or left.unit != true.unit:
        return None
    if left.whole is not None and true.whole is not None:
        # Relative tolerance would take one eight-digit serial number for the next.
        return left.whole == true.whole
    distance = abs(left.value - true.value) / (max(abs(left.value), abs(true.value)) or 1.0)
    if distance <= RELATIVE_TOLERANCE:
        return True
    return None if distance < ROUNDING else False


def _quantity(text: str) -> _Quantity | None:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    symbol, sign, digits, decimals, exponent, unit = match.groups()
    if not (digits or decimals[1:]) or (len(digits) > 1 and digits[0] == "0"):
        return None
    digits = sign + digits.replace(",", "")
    value = float(f"{digits}{decimals}e{exponent or 0}")
    if not math.isfinite(value):
        return None
    whole = int(digits) if not decimals and exponent is None else None
    return _Quantity(value, whole, (symbol, _UNIT_NAMES.get(unit, unit)))


def _is_hostile(prediction: str, truth: str) -> bool:
    """Tags of the protocol, chat markers, or control characters, unless the ground truth holds them too."""
    if any(tag not in truth for tag in _TAG.findall(prediction)):
        return True
    if prediction.isascii():
        unseen = set(_CONTROL.findall(prediction))
    else:
        unseen = {letter for letter in prediction if unicodedata.category(letter)[0] == "C"} - set("\t\n\r")
    return not unseen <= set(truth)


@functools.lru_cache(maxsize=4096)
def _clean(text: str) -> str:
    """One line, without marks around it and punctuation at its end; NFKC where that keeps the meaning."""
    if not text.isascii():
        # NFKC alone turns 3² into 32 and 1½ into 11/2.
        text = _SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
        text = _VULGAR_FRACTION.sub(lambda match: " " + match[0], text)
        text = unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY)
    text = " ".join(text.split())
    for _ in range(4):
        before = text
        text = _unwrapped(_EXCLAMATION.sub("", text.rstrip(" .,;:")))
        if text == before:
            break
    return text


def _unwrapped(text: str) -> str:
    for left, right in _WRAPPERS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner and right not in inner:
            return inner.strip()
    for command in _COMMANDS:
        if text.startswith(command) and _closing_brace(text, len(command)) == len(text) - 1:
            return text[len(command) : -1].strip()
    return text


def _bare(text: str) -> str:
    """The answer without "The answer is", or what the text's only `\\boxed{}` holds."""
    if text.count(r"\boxed{") == 1:
        start = text.index(r"\boxed{") + len(r"\boxed{")
        end = _closing_brace(text, start)
        text = text[start:end] if end > 0 else text
    return _clean(_PREAMBLE.sub("", text, count=1) if _PREAMBLE.match(text) else text)


def _closing_brace(text: str, start: int) -> int:
    """Where the brace that is open at `start` closes; -1 where it does not."""
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    return -1


def _without(text: str, opening: str, closing: str) -> str:
    """The text without what stands from each opening tag to the next closing one. Time is linear in its length."""
    kept, position = [], 0
    while (start := text.find(opening, position)) >= 0 and (end := text.find(closing, start)) >= 0:
        kept.append(text[position:start])
        position = end + len(closing)
    return "\n".join([*kept, text[position:]])
