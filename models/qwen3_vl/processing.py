"""Messages, images and videos to token ids and patches, turn by turn: a trajectory is never encoded anew."""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from PIL import Image
from transformers import PreTrainedTokenizerFast

from models.policy import PolicyConfig
from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.images import EncodedImage, placeholder_ids
from models.qwen3_vl.pixels import ImageSettings, PatchSettings, encode_image, load_image
from models.qwen3_vl.processor_files import (
    read_image_settings,
    read_json,
    read_stop_ids,
    read_tokenizer,
    read_video_settings,
)
from models.qwen3_vl.video import EncodedVideo, Video, VideoSettings, encode_video

__all__ = ["EncodedPrompt", "Message", "Processor", "load_image"]

Message = Mapping[str, Any]
"""`{"role", "content"}`: content is a string, or parts of type text (with a "text"), image and video.

An image part may carry its image: `{"type": "image", "image": path or data URI}`. So may a video part, `{"type":
"video", "video": path, data URI or list of frame images}`, beside which `fps` or `num_frames` may say what to sample.
"""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """What is said as the model sees it, placeholders of images and videos expanded."""

    token_ids: Int[np.ndarray, " tokens"]
    images: tuple[EncodedImage, ...]
    """In the order of the tokens; a video's are one for each time that it shows."""


class ObservationTurn(NamedTuple):
    """A turn that shows what a tool returned, as much of it as there was room for."""

    token_ids: Int[np.ndarray, " tokens"]
    images: int
    """How many were kept, from the first on."""
    text: str


@dataclass(frozen=True, kw_only=True)
class _Turns:
    """The chat template's own text around what is said, found by rendering marks and looking where they went."""

    assistant_end: str
    user_start: str
    image: str
    user_end: str
    """The end of the user's turn and the start of the assistant's next."""


class Processor:
    """Tokenizer, chat template, image and video settings of a Qwen3-VL directory.

    What is said is data: special tokens written in a message or an observation are encoded as plain text, and only
    the chat template can write them. Safe to use from several threads.
    """

    def __init__(
        self,
        *,
        config: Qwen3VLConfig,
        tokenizer: PreTrainedTokenizerFast,
        image_settings: ImageSettings,
        video_settings: VideoSettings,
        stop_ids: Iterable[int] = (),
    ):
        self.image_settings = image_settings
        self.video_settings = video_settings
        _check_sizes(config, image_settings, "preprocessor_config.json")
        _check_sizes(config, video_settings, "video_preprocessor_config.json")
        self._take(config, tokenizer, stop_ids)

    def _take(self, config: PolicyConfig, tokenizer: PreTrainedTokenizerFast, stop_ids: Iterable[int]) -> None:
        """What text needs."""
        self.config = config
        self.tokenizer = tokenizer
        # Two encoders of their own: transformers switches one shared object back and forth, which threads would see.
        self._control = copy.deepcopy(tokenizer.backend_tokenizer)
        self._control.encode_special_tokens = False
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        for encoder in (self._control, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
        added = self._control.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

        closing = self._encode_rendered(self._turns.assistant_end, {})
        self.close_turn: Int[np.ndarray, " tokens"] = _ids(closing)
        """What ends an assistant turn that stopped right after `</tool_call>`."""
        self.after_end_of_turn: Int[np.ndarray, " tokens"] = _ids(closing[1:])
        """The same where the policy itself sampled the end-of-turn token."""
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([closing[0], *stop_ids]))
        """Tokens that end a trajectory's turn; the first is the one the chat template closes a turn with."""
        self.tool_call_end: tuple[int, ...] = tuple(self._plain.encode("</tool_call>", add_special_tokens=False).ids)
        """The tokens of `</tool_call>`: one where the tokenizer knows it, as Qwen's do, else several."""
        self.forbidden: Bool[np.ndarray, " vocabulary"] = self._forbidden()
        """Ids that may never be sampled: vision placeholders, and ids of the model that the tokenizer does not know."""

    def __reduce__(self):
        # Made anew where it is unpickled (data workers, deep copies): a pickled encoder forgets which of the two it is.
        names = ("config", "tokenizer", "image_settings", "video_settings", "stop_ids")
        return functools.partial(Processor, **{name: getattr(self, name) for name in names}), ()

    @classmethod
    def from_hf(cls, directory: str | Path) -> "Processor":
        """From a directory in HF format. Raises ValueError, one line, that names the file that is missing or wrong."""
        directory = Path(directory)
        config = Qwen3VLConfig.from_hf(read_json(directory, "config.json"))
        tokenizer = read_tokenizer(directory)
        return cls(
            config=config,
            tokenizer=tokenizer,
            image_settings=read_image_settings(directory),
            video_settings=read_video_settings(directory),
            stop_ids=read_stop_ids(directory, tokenizer),
        )

    # Encoding

    def encode_image(self, image: Image.Image) -> EncodedImage:
        """Patches of one image, as transformers' image processor makes them; transparency is put on white."""
        return encode_image(image, self.image_settings)

    def encode_video(self, video: Video) -> EncodedVideo:
        """Patches and times of one video, as transformers' video processor makes them."""
        return encode_video(video, self.video_settings)

    def encode_text(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text without any wrapper, special tokens in it as plain text."""
        return _ids(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_messages(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image] | None = None,
        videos: Sequence[Video] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> EncodedPrompt:
        """A conversation by the chat template; parts take `images` and `videos` in order, or, when None, their own.

        `tools`: schemas that the template is to describe. Raises ValueError where parts do not match what came with
        them, or the template refuses the messages.
        """
        messages = [_merged(message) for message in messages]
        parts = [part for message in messages for part in _parts(message)]
        encoded = self._encode_media(parts, images, videos)
        calls = [message.get("tool_calls") for message in messages]
        masks = self._masks([*(part["text"] for part in parts if "text" in part), *_strings([calls, tools])])
        masked = [self._masked_message(message, masks) for message in messages]
        rendered = self._render(masked, add_generation_prompt, self._masked_all(tools, masks))
        return self._expand(self._encode_rendered(rendered, masks), *encoded)

    def user_turn(self, message: Message, images: Sequence[Image.Image], videos: Sequence[Video]) -> EncodedPrompt:
        """A later turn of the user, its parts in their order, and the start of the assistant's next turn."""
        turns, parts = self._turns, _parts(_merged(message))
        encoded = self._encode_media(parts, images, videos)
        masks = self._masks(part["text"] for part in parts if "text" in part)
        shown = {"image": turns.image, "video": self._video_mark}
        said = "".join(shown.get(part["type"]) or self._masked(part["text"], masks) for part in parts)
        return self._expand(self._encode_rendered(turns.user_start + said + turns.user_end, masks), *encoded)

    def observation_turn(
        self, text: str, images: Sequence[EncodedImage] = (), max_tokens: int | None = None
    ) -> ObservationTurn:
        """The user turn that shows `images` and then `text`, and the start of the assistant's next turn.

        What does not fit `max_tokens` is cut: images whole, from the end, and then the text's middle, where a mark
        says how many tokens are missing.
        """
        turns = self._turns

        def encode(said: str, count: int) -> list[int]:
            masks = self._masks([said])
            shown = turns.user_start + turns.image * count
            return self._encode_rendered(shown + self._masked(said, masks) + turns.user_end, masks)

        if max_tokens is None:
            return ObservationTurn(self._expand(encode(text, len(images)), images).token_ids, len(images), text)
        kept = self._images_that_fit(text, images, max_tokens - len(encode("", 0)))
        if kept < len(images):
            text = f"{text}\n" * bool(text) + f"[{len(images) - kept} of {len(images)} images left out: no room]"
        placeholders = sum(image.tokens(self.config) - 1 for image in images[:kept])
        ids, text = self._encode_within(text, lambda said: encode(said, kept), max_tokens - placeholders)
        return ObservationTurn(self._expand(ids, images[:kept]).token_ids, kept, text)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " tokens"], *, keep_special: bool = False) -> str:
        """The text of `ids`, special tokens included; without `keep_special` those that end a turn are left out."""
        numbers = [int(number) for number in ids]
        if not keep_special:
            numbers = [number for number in numbers if number not in self.stop_ids]
        return self._control.decode(numbers, skip_special_tokens=False)

    # Inside

    def _forbidden(self) -> Bool[np.ndarray, " vocabulary"]:
        mask = np.ones(self.config.text.vocab_size, bool)
        known = np.fromiter(self._control.get_vocab(with_added_tokens=True).values(), np.int64)
        mask[known[known < len(mask)]] = False
        mask[list(self._placeholders())] = True
        return mask

    def _placeholders(self) -> tuple[int, ...]:
        """Tokens around images and in their places."""
        return *placeholder_ids(self.config), *self._brackets()

    def _brackets(self) -> tuple[int, int]:
        """What stands before and after an image's features."""
        config = self.config
        assert isinstance(config, Qwen3VLConfig)
        return config.vision_start_token_id, config.vision_end_token_id

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    @functools.cached_property
    def _turns(self) -> _Turns:
        question, answer, reply = "QUESTION-7f3a", "ANSWER-7f3a", "REPLY-7f3a"
        opening = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        pictures = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": reply}]
        closed = self._render(opening, False)
        replied = self._render([*opening, {"role": "user", "content": reply}], True)
        shown = self._render([*opening, {"role": "user", "content": pictures}], True)
        end = closed.rpartition(answer)[2]
        middle, _, user_end = replied.rpartition(answer)[2].partition(reply)
        with_images = shown.rpartition(answer)[2].partition(reply)[0]
        user_start, image = middle[len(end) :], with_images[len(middle) : (len(middle) + len(with_images)) // 2]
        if not (end and middle.startswith(end) and user_end and with_images == middle + image + image):
            raise ValueError("the chat template does not render turns one after the other; expected one like Qwen's")
        return _Turns(assistant_end=end, user_start=user_start, image=image, user_end=user_end)

    @functools.cached_property
    def _video_mark(self) -> str:
        """What the chat template writes for a video."""
        before, after = "BEFORE-7f3a", "AFTER-7f3a"
        parts = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": after}]
        return self._render([{"role": "user", "content": parts}], False).partition(before)[2].partition(after)[0]

    def _masks(self, texts: Iterable[str]) -> Mapping[str, str]:
        """A stand-in character for each special token that is written in `texts`; empty where none is."""
        text = "".join(texts)
        written = sorted({match.group() for match in self._special_pattern.finditer(text)})
        unused = [chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text]
        if len(unused) < len(written):
            raise ValueError("the text holds nearly every private character of Unicode; expected some to be left over")
        return dict(zip(written, unused, strict=False))

    def _masked(self, text: str, masks: Mapping[str, str]) -> str:
        return self._special_pattern.sub(lambda match: masks[match.group()], text) if masks else text

    def _masked_message(self, message: Message, masks: Mapping[str, str]) -> Message:
        """Special tokens masked; of images and videos only that they are there."""
        if message.get("tool_calls"):
            message = {**message, "tool_calls": self._masked_all(message["tool_calls"], masks)}
        if isinstance(message.get("content"), str):
            return {**message, "content": self._masked(message["content"], masks)}
        parts = [
            {**part, "text": self._masked(part["text"], masks)} if part["type"] == "text" else {"type": part["type"]}
            for part in _parts(message)
        ]
        return {**message, "content": parts}

    def _masked_all(self, value: Any, masks: Mapping[str, str]) -> Any:
        """The same for every string in what JSON holds, keys included."""
        if isinstance(value, str):
            return self._masked(value, masks)
        if isinstance(value, Mapping):
            return {self._masked(key, masks): self._masked_all(entry, masks) for key, entry in value.items()}
        return [self._masked_all(entry, masks) for entry in value] if isinstance(value, list | tuple) else value

    def _encode_rendered(self, rendered: str, masks: Mapping[str, str]) -> list[int]:
        """Ids of rendered text: special tokens are control tokens, masked ones are plain text."""
        if not masks:
            return self._control.encode(rendered, add_special_tokens=False).ids
        unmasked = str.maketrans({mask: special for special, mask in masks.items()})
        ids: list[int] = []
        for piece in self._special_pattern.split(rendered):
            if piece in self._special:
                ids.append(self._special[piece])
            else:
                ids.extend(self._plain.encode(piece.translate(unmasked), add_special_tokens=False).ids)
        return ids

    def _encode_media(
        self,
        parts: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] | None,
        videos: Sequence[Video] | None,
    ) -> tuple[Sequence[EncodedImage], Sequence[EncodedVideo]]:
        """What image and video parts show. Raises ValueError for parts of another type, and for wrong counts."""
        of_type: dict[str, list[Mapping[str, Any]]] = {"text": [], "image": [], "video": []}
        for part in parts:
            if part.get("type") not in of_type:
                raise ValueError(f"message part of type {part.get('type')!r}; expected 'text', 'image' or 'video'")
            of_type[part["type"]].append(part)
        images = [_carried(part) for part in of_type["image"]] if images is None else images
        videos = [Video.from_part(part) for part in of_type["video"]] if videos is None else videos
        for kind, given in (("image", images), ("video", videos)):
            if len(given) != len(of_type[kind]):
                count = len(of_type[kind])
                raise ValueError(f"the messages have {count} {kind} parts; {len(given)} {kind}s came with them")
        return [self.encode_image(image) for image in images], [self.encode_video(video) for video in videos]

    def _expand(
        self, ids: Sequence[int], images: Sequence[EncodedImage], videos: Sequence[EncodedVideo] = ()
    ) -> EncodedPrompt:
        """One placeholder an image -> one a feature; one a video -> its times, each before its features."""
        image_id, video_id = placeholder_ids(self.config)
        flat = _ids(ids)
        for kind, placeholder, given in (("image", image_id, images), ("video", video_id, videos)):
            if (found := np.count_nonzero(flat == placeholder)) != len(given):
                raise ValueError(f"the chat template wrote {found} {kind} placeholders for {len(given)} {kind}s")
        pieces, shown, at = [], [], 0
        next_image, next_video = iter(images), iter(videos)
        for place in np.flatnonzero(np.isin(flat, (image_id, video_id))):
            pieces.append(flat[at:place])
            at = place + 1
            if flat[place] == image_id:
                image = next(next_image)
                pieces.append(np.full(image.tokens(self.config), image_id, np.int32))
                shown.append(image)
            else:
                video = next(next_video)
                pieces.extend(self._timed(*one) for one in zip(video.seconds, video.images, strict=True))
                shown.extend(video.images)
        return EncodedPrompt(token_ids=np.concatenate([*pieces, flat[at:]]), images=tuple(shown))

    def _timed(self, seconds: float, image: EncodedImage) -> Int[np.ndarray, " tokens"]:
        """What a video shows at a time, as transformers' processor writes it into the template's own brackets."""
        features = [self.config.video_token_id] * image.tokens(self.config)
        mark = self.encode_text(f"<{seconds:.1f} seconds>")
        before, after = self._brackets()
        return np.concatenate([mark, _ids([before, *features, after])])

    def _images_that_fit(self, text: str, images: Sequence[EncodedImage], room: int) -> int:
        """How many of the first images leave room for the text, or for a quarter of it where it is long."""
        wrapper = len(self._encode_rendered(self._turns.image, {})) - 1
        room -= min(len(self._plain.encode(text, add_special_tokens=False)), room // 4)
        kept = 0
        for image in images:
            room -= wrapper + image.tokens(self.config)
            if room < 0:
                break
            kept += 1
        return kept

    def _encode_within(self, text: str, encode: Callable[[str], list[int]], budget: int) -> tuple[list[int], str]:
        """`encode(text)`, or of its head and tail around a mark, in at most `budget` ids; and the text that is left."""
        ids = encode(text)
        if len(ids) <= budget:
            return ids, text
        spans = self._plain.encode(text, add_special_tokens=False).offsets
        keep = max(budget - len(encode("")), 0)
        while keep > 0:
            head, tail = (keep + 1) // 2, keep // 2
            # By characters, not ids: a cut inside a character would leave bytes that are no text.
            start = spans[head - 1][1]
            end = max(start, spans[-tail][0] if tail else len(text))
            left = f"{text[:start]}\n[... {len(spans) - keep} tokens cut ...]\n{text[end:]}"
            ids = encode(left)
            if len(ids) <= budget:
                return ids, left
            keep -= len(ids) - budget
        ids = encode("")
        if len(ids) > budget:
            raise ValueError(f"an observation may take {budget} tokens; an empty one takes {len(ids)} already")
        return ids, ""


def _ids(ids: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    return np.asarray(ids, np.int32)


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content or []


def _merged(message: Message) -> Message:
    """Texts side by side as one: what stands in two of them, half and half, is found like what stands in one."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    merged: list[Mapping[str, Any]] = []
    for part in content:
        if part.get("type") == "text" and merged and merged[-1].get("type") == "text":
            merged[-1] = {**merged[-1], "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return {**message, "content": merged}


def _strings(value: Any) -> Iterator[str]:
    """Every string in what JSON holds, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _carried(part: Mapping[str, Any]) -> Image.Image:
    source = part.get("image")
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | bytes | Path):
        raise ValueError(f"an image part carries {source!r}; expected a path or a data URI under 'image'")
    return load_image(source)


def _check_sizes(config: Qwen3VLConfig, settings: PatchSettings, file: str) -> None:
    vision = config.vision
    expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    found = (settings.patch_size, settings.temporal_patch_size, settings.merge_size)
    if found != expected:
        raise ValueError(f"{file} has patch, temporal patch and merge sizes {found}; config.json has {expected}")
