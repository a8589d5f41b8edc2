"""The efficiency reward: fewer tool calls are better, among right answers only."""


def tool_reward(calls: int, correct: bool) -> float:
    """`1 / (calls + 1)` for a right answer, else 0. Source: arXiv:2604.08545.

    Args:
        calls: every tool call sent, also a malformed, unknown, refused, timed-out or failed one; the answering
            turn is none.
    """
    if calls < 0:
        raise ValueError(f"calls is {calls}; a trajectory sends 0 or more")
    return 1.0 / (calls + 1) if correct else 0.0
