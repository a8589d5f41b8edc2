"""What a policy is told of its task and its tools where nobody else says it; data sets bring their own words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def told_of_tools(messages: Sequence[Mapping[str, Any]], system: str) -> Sequence[Mapping[str, Any]]:
    """The messages, with this system message where they have none of their own."""
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def system_prompt(schemas: Sequence[Mapping[str, Any]]) -> str:
    """The goal, the tools and the format of a turn; source: the protocol of arXiv:2604.08545."""
    tools = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    return (
        "Answer the user's question accurately, with as few tool calls as needed: where what you see and know is "
        "enough, call none.\n\n"
        f"Tools, each as JSON:\n{tools}\n\n"
        "Each of your turns is <reason>your thoughts</reason>, and then either one tool call,\n"
        '<tool_call>{"name": "...", "arguments": {...}}</tool_call>\n'
        "whose result comes back in the next turn, or the final answer,\n"
        "<answer>...</answer>"
    )
