"""Does a response keep to the protocol: balanced tags, and an answer after the reasoning?"""


def format_reward(text: str) -> float:
    """1.0 where the policy's own text keeps to the protocol, else 0.0.

    As many `<reason>` as `</reason>`, as many `<tool_call>` as `</tool_call>`, and after the last `</reason>`
    as many `<answer>` as `</answer>`, at least one. `<reason>` may be missing. Source: the authors' release.

    Args:
        text: what the policy wrote, all turns; no observations.
    """
    answer_part = text[text.rfind("</reason>") + 1 :]  # The whole text where there is no </reason>: rfind gives -1.
    answers = answer_part.count("<answer>")
    return float(
        text.count("<reason>") == text.count("</reason>")
        and text.count("<tool_call>") == text.count("</tool_call>")
        and answers == answer_part.count("</answer>")
        and answers >= 1
    )
