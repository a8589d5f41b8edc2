"""A small byte-level tokenizer with Qwen's special tokens and chat layout, trained on a task's own texts."""

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
PLAIN_TOKENS = ("<tool_call>", "</tool_call>")
"""Single tokens, but ordinary text: decoding keeps them, as with Qwen."""

PIECES = r"\p{Lu}|\p{N}{1,3}|[^\p{Lu}\p{N}\n]*\n+|[^\p{Lu}\p{N}\n]+"
"""Merges stay within a piece: a capital letter, up to three digits, or a run of anything else.

Inscriptions are read letter by letter and a coordinate is one token, while a task's fixed phrases, with their
punctuation, shrink to a few tokens. Runs end at newlines, so that the header of an assistant turn never merges
with what the policy writes behind it.
"""

_ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools and messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\n' + tools | map('tojson') | join('\\n') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' -}}
    {{- render(message.content or '') -}}
    {%- if tools and loop.first and message.role == 'system' -%}
        {{- '\\n' + tools | map('tojson') | join('\\n') -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {%- set call = call.function or call -%}
        {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' -}}
        {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""Qwen's turns, without its defaults: what the messages say is all that the policy sees."""


def train_tokenizer(corpus: Iterable[str], *, vocabulary: int) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary` tokens, special ones included, which come last as in Qwen.

    Every string of unicode round-trips: all bytes are tokens, and nothing is normalised.
    """
    added = len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)
    smallest = 256 + added
    if vocabulary < smallest:
        raise ValueError(f"a vocabulary of {vocabulary} can not hold all bytes; it takes at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(corpus), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def _training_texts(corpus: Iterable[str]) -> Iterator[str]:
    """What stands between the added tokens, which the trainer does not know, and the headers of turns."""
    borders = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + PLAIN_TOKENS)))
    for text in corpus:
        yield from borders.split(text)
        yield from (f"{role}\n" for role in _ROLES)
