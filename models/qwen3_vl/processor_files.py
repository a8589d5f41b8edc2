"""What a directory in HF format says about processing: its tokenizer, chat template, settings of images and videos."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.qwen3_vl.pixels import ImageSettings
from models.qwen3_vl.video import VideoSettings


def read_json(directory: Path, name: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON file; `missing` where there is none. Raises ValueError, one line, that names it."""
    path = directory / name
    if not path.is_file():
        if missing is not None:
            return missing
        raise ValueError(f"{directory} has no {name}; expected a Qwen3-VL directory in HF format")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with the chat template of the processor. Raises ValueError, one line."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{directory} has no tokenizer.json; expected a Qwen3-VL directory in HF format")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # The Rust reader raises bare Exceptions.
        raise ValueError(f"the tokenizer of {directory} can not be loaded: {str(error).splitlines()[0]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory} holds a {type(tokenizer).__name__}; expected one with a tokenizer.json")
    tokenizer.chat_template = _chat_template(directory, tokenizer.chat_template)
    return tokenizer


def read_stop_ids(directory: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What ends a turn by generation_config.json, and by the tokenizer."""
    ends = read_json(directory, "generation_config.json", {}).get("eos_token_id")
    found = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return [number for number in found if number is not None]


def _chat_template(directory: Path, of_tokenizer: str | dict[str, str] | None) -> str:
    """The template that transformers' processor would use: its own file before the tokenizer's."""
    legacy = read_json(directory, "chat_template.json", {}).get("chat_template")
    if legacy is not None:
        return legacy
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    found = of_tokenizer.get("default") if isinstance(of_tokenizer, dict) else of_tokenizer
    if found is None:
        raise ValueError(f"{directory} has no chat template; expected chat_template.jinja or chat_template.json")
    return found


def read_image_settings(directory: Path) -> ImageSettings:
    """From processor_config.json where it holds them (transformers 5 writes that), or preprocessor_config.json."""
    return ImageSettings.from_dict(_image_processor(directory))


def read_video_settings(directory: Path) -> VideoSettings:
    """From processor_config.json, or video_preprocessor_config.json, or, as transformers does, those of images."""
    nested = read_json(directory, "processor_config.json", {}).get("video_processor")
    found = nested or read_json(directory, "video_preprocessor_config.json", {})
    return VideoSettings.from_dict(found or _image_processor(directory))


def _image_processor(directory: Path) -> dict[str, Any]:
    nested = read_json(directory, "processor_config.json", {}).get("image_processor")
    return nested or read_json(directory, "preprocessor_config.json")
