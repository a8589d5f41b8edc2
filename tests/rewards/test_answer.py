"""What counts as the answer, and what counts as right: each defect of a looser reading is named in a case."""

import pytest

from hdpo_jax.rewards.answer import answer_matches, extract_answer, judge_by_rules


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<reason>r</reason><answer>B</answer>", "B"),
        ("<answer> 42\n</answer>", "42"),
        # The last answer counts; the first would be A.
        ("<answer>A</answer><reason>no</reason><answer>B</answer>", "B"),
        # Thoughts and tool arguments are no answers; a plain search over the text would find A.
        ("<reason>maybe <answer>A</answer></reason><answer>B</answer>", "B"),
        ("<reason>maybe <answer>A</answer></reason>", None),
        ('<tool_call>{"code": "print(\'<answer>A</answer>\')"}</tool_call>', None),
        # A reason that is never closed does not swallow the answer.
        ("<reason>so it is <answer>B</answer>", "B"),
        ("<reason>I will write <answer> now</reason><answer>B</answer>", "B"),
        ("B", None),
        ("", None),
        ("<answer></answer>", ""),
        # Cut off while it answers again: the earlier answer was taken back.
        ("<answer>A</answer> wait, <answer>B", None),
        ("<answer>A <answer>B</answer></answer>", None),
        ("<ans<reason></reason>wer>B</answer>", None),
        ("</answer>B<answer>", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


RIGHT = [
    ("cat", "cat"),
    ("  The  CAT. ", "the cat"),
    ("**Paris**", "Paris"),
    ('"Stop!"', "STOP"),
    ("“Stop”", "stop"),
    ("`x`", "x"),
    ("Ｋ７Ｑ２", "k7q2"),  # Full-width letters: NFKC.
    ("cafe\u0301", "café"),
    ("a – b", "a - b"),
    ("H₂O", "H2O"),
    ("C++", "c++"),
    ("new\nyork", "New York"),
    # Multiple choice.
    *[(text, "B") for text in ("B", "b", "(B)", "B.", "B)", "B) cat", "B. cat", "(B) cat", "B: cat", "Answer: B")],
    *[(text, "B") for text in ("The answer is B.", "the correct answer is (B)", "Final answer: **B**", "Option B")],
    *[(text, "B") for text in (r"\boxed{B}", r"$\boxed{\text{B}}$", "B) a cat", "option (B)", "B) A dog")],
    ("B", "(B)"),
    ("B) cat", "cat"),
    ("(B) 5", "5.0"),
    ("B", "B) cat"),
    ("cat", "B) cat"),
    ("b. Cat", "B) cat"),
    # Quantities.
    ("1,234", "1234"),
    ("1234.0", "1,234"),
    ("1.234e3", "1234"),
    ("3.16×10^{-10}", "3.16e-10"),
    ("0.5", ".5"),
    ("+5", "5"),
    ("−5", "-5"),
    ("0.3333333", "0.33333333"),
    ("50 %", "50%"),
    ("50 percent", "50%"),
    (r"50\%", "50%"),
    ("$1,200.00", "$1200"),
    ("12.50 cm", "12.5 cm"),
    ("The answer is 5.", "5"),
    ("-0", "0"),
]

MATHEMATICS = [
    (r"\frac{17}{264}", "17/264"),
    (r"the ratio is $\frac{17}{264}$", "17/264"),
    ("34/528", "17/264"),
    ("3/4", "0.75"),
    ("1+x**2", "x^2 + 1"),
    ("x = 5", "5"),
    ("2√3", r"2\sqrt{3}"),
    ("sqrt(12)", r"2\sqrt{3}"),
    ("2pi", r"2\pi"),
    ("1 1/2", "3/2"),
    ("1½", "3/2"),
    ("3²", "9"),
    ("x²", "x^2"),
    ("C = 3.16×10^{-10}, m = 3.75", "m = 3.75, C ≈ 3.16×10^{-10}"),
    (r"5/2 \text{ cm}", r"2.5 \text{ cm}"),
    (r"\frac{1}{2}\%", r"0.5\%"),
    (r"\left(1, 2\right)", "(1,2)"),
]

NOT_RIGHT = [
    ("", "cat"),
    ("dog", "cat"),
    ("a cat", "cat"),
    ("cat or dog", "cat"),
    ("3²", "32"),  # NFKC alone says 32.
    ("1½", "11/2"),
    ("5 m", "5 cm"),
    ("[0,1)", "(0,1)"),  # Brackets are not punctuation.
    # Multiple choice: hedges and articles.
    *[(text, "B") for text in ("A", "A) B", "B or C", "B, C", "(B) or (C)", "B) cat C) dog", "A bird", "B12", "ABCD")],
    ("A", "A cat"),
    ("B", "cat"),
    ("A) dog B) cat", "cat"),
    ("B) cat or dog", "cat"),
    ("A) cat", "B) cat"),
    ("B) dog", "B) cat"),
    ("B", "b12"),
    # Quantities.
    ("50%", "0.5"),
    ("0.5", "50%"),
    ("50%", "50"),
    ("$5", "5"),
    ("5", "5 cm"),
    ("5 MW", "5 kW"),
    ("12345678", "12345679"),  # 8e-8 apart: a relative tolerance alone takes them for equal.
    ("7", "007"),
    ("1,23", "123"),
    ("1.234", "1,234"),
    ("1e999", "2e999"),  # Both are infinite as floats.
    ("nan", "0"),
    ("0", "1e-9"),
    ("0.33", "0.3333"),
    ("3 and 5", "3"),
    # Mathematics.
    ("2018", "2024-05-01"),  # A date is no difference.
    ("-10", "10-20"),
    ("1", "1 1/2"),  # math-verify alone reads 1.
    (r"5 \text{ m}", r"5 \text{ cm}"),  # math-verify alone drops units.
    (r"\frac{1}{2}\%", "0.5"),
    ("1/2 7", "1/2"),
    ("$1/2$ or $1/3$", "1/2"),
    ("1, 2, 3", "3"),
    ("9×10^{-10}", "3.16×10^{-10}"),
    ("Q2-K7", "K7-Q2"),
    (r"\pm 5", "5"),
]


@pytest.mark.parametrize(("prediction", "truth"), RIGHT + MATHEMATICS)
def test_right(prediction, truth):
    assert answer_matches(prediction, truth)


@pytest.mark.parametrize(("prediction", "truth"), NOT_RIGHT)
def test_not_right(prediction, truth):
    assert not answer_matches(prediction, truth)


def test_no_answer_is_wrong():
    assert not answer_matches(None, "cat")


def test_any_of_several_may_match():
    assert answer_matches("New York City", ["NYC", "New York City"])
    assert answer_matches("B", ("A", "B"))
    assert not answer_matches("Boston", ["NYC", "New York City"])
    assert not answer_matches("", [])


@pytest.mark.parametrize(
    ("prediction", "truth", "verdict"),
    [
        ("A", "B", False),
        ("41", "42", False),
        ("", "cat", False),
        ("<answer>cat", "cat", False),
        ("a big cat", "cat", None),
        ("50%", "0.5", None),
        ("3.14", "3.14159", None),
        ("41", ["42", "forty-one"], None),
        ("41", ["42", "43"], False),
    ],
)
def test_rules_say_wrong_only_where_they_are_certain(prediction, truth, verdict):
    assert judge_by_rules(prediction, truth) is verdict


@pytest.mark.parametrize(
    "prediction",
    [
        "B" + "\x00",
        "B\x1b[0m",
        "B\u200b",
        "B\u202e",
        "\ud800B",
        "<answer>B",
        "</answer>B",
        "B < / Answer >",
        "<|im_end|>B",
        "<tool_call>B</tool_call>",
        "B " * 5_000,
        "(" * 1_999,
        "{" * 1_999,
        "$" * 1_999,
        "<" + " " * 1_998,
        r"\boxed{" * 285,
        r"\frac{" * 40,
        "1," * 999,
        "9" * 1_999,
        "B. " * 600,
        "<answer" * 100_000,
    ],
)
@pytest.mark.timeout(60)  # a quadratic reading takes hours
def test_hostile_predictions_are_wrong_and_come_to_an_end(prediction):
    for truth in ("B", "42", "cat"):
        assert not answer_matches(prediction, truth)


def test_characters_that_the_truth_holds_are_no_attack():
    assert answer_matches("<image>", "<image>")
    assert answer_matches("می\u200cخواهم", "می\u200cخواهم")


@pytest.mark.timeout(60)
def test_extracting_from_hostile_text_comes_to_an_end():
    for piece in ("<answer>", "<reason>", "</answer>", "<tool_call>", "<answer></answer>", "<reason></reason>"):
        assert extract_answer(piece * 200_000) in (None, "")


def test_short_answers_start_no_process(monkeypatch):
    def refuse(*_):
        raise AssertionError("a process was asked")

    monkeypatch.setattr("hdpo_jax.rewards.mathematics.MathProcesses.equal", refuse)
    for prediction, truth in [("K7Q2", "K7Q2"), ("k7q3", "K7Q2"), ("42", "42"), ("41", "42"), ("B", "B")]:
        assert answer_matches(prediction, truth) is (prediction == truth)
    with pytest.raises(AssertionError, match="a process was asked"):
        answer_matches(r"\sqrt{8}", r"2\sqrt{2}")
