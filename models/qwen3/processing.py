"""Messages to token ids for a model that reads text only."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerFast

from models.qwen3.config import Qwen3Config
from models.qwen3_vl.images import EncodedImage
from models.qwen3_vl.processing import Message, Processor
from models.qwen3_vl.processor_files import read_stop_ids, read_tokenizer
from models.qwen3_vl.stored import read_json
from models.qwen3_vl.video import EncodedVideo, Video


class TextProcessor(Processor):
    """Tokenizer and chat template of a Qwen3 directory; images and videos are refused."""

    def __init__(self, *, config: Qwen3Config, tokenizer: PreTrainedTokenizerFast, stop_ids: Iterable[int] = ()):
        self._take(config, tokenizer, stop_ids)

    def __reduce__(self):
        made = {"config": self.config, "tokenizer": self.tokenizer, "stop_ids": self.stop_ids}
        return functools.partial(TextProcessor, **made), ()

    @classmethod
    def from_hf(cls, directory: str | Path) -> "TextProcessor":
        """From a directory in HF format. Raises ValueError, one line, that names the file that is missing or wrong."""
        directory = Path(directory)
        config = Qwen3Config.from_hf(read_json(directory / "config.json"))
        tokenizer = read_tokenizer(directory)
        return cls(config=config, tokenizer=tokenizer, stop_ids=read_stop_ids(directory, tokenizer))

    def encode_image(self, image: Image.Image) -> EncodedImage:
        """Raises ValueError."""
        raise ValueError("an image came for a model that reads text only; expected text, or a Qwen3-VL")

    def encode_video(self, video: Video) -> EncodedVideo:
        """Raises ValueError."""
        raise ValueError("a video came for a model that reads text only; expected text, or a Qwen3-VL")

    def _placeholders(self) -> tuple[int, ...]:
        return ()

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        # Templates of text models know contents that are strings, and leave out others without a word.
        said = [{**message, "content": _text_of(message)} for message in messages]
        return super()._render(said, add_generation_prompt, tools)


def _text_of(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")
