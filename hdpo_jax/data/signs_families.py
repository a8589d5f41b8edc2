"""The families of questions of the built-in task: their wordings, and what their signs may say.

read     One sign: what does it say?
which    Two signs of different colours; the question names one.
count    Fields with one to six dots each, as on dice: how many are there?
facts    Towns have codes. Those of KNOWN_TOWNS are always the same, and can be known by heart; that of any
         other town is on the board alone, in letters too small for the policy's view: it must be looked up.
"""

QUESTIONS = {
    "read": (
        "What does the sign say?",
        "What is written on the sign?",
        "Read the sign.",
        "Which letters are on the sign?",
        "What is the text on the plate?",
        "Name the letters on the plate.",
        "What can be read on the sign?",
        "Spell the inscription.",
    ),
    "which": (
        "What does the {color} sign say?",
        "What is written on the {color} sign?",
        "Read the {color} sign.",
        "Which letters are on the {color} sign?",
    ),
    "count": (
        "How many dots are in each field?",
        "Count the dots in every field.",
        "How many dots does each field hold?",
        "Count the dots, field by field.",
    ),
    "facts": (
        "What is the code of {town}?",
        "Name the code of {town}.",
        "Which code does {town} have?",
        "Spell the code of {town}.",
    ),
}

DOTS = "123456"
"""How many dots a field may have, as in an answer."""

KNOWN_TOWNS = ("Balen", "Corvo", "Dunmar", "Ferrol", "Halden", "Kirova", "Lomar", "Nessin")
TOWN_HEADS = ("Ar", "Bel", "Cal", "Dor", "Fen", "Gar", "Hol", "Mar", "Nor", "Ras", "Tol", "Vel")
TOWN_TAILS = ("da", "den", "go", "kirk", "lin", "mere", "nu", "ria", "sund", "tova", "wick", "zen")
"""Any head with any tail is a town whose code nobody can know."""
