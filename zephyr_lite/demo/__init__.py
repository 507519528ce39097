"""The demo's data and questions: the whole recipe in miniature.

The conversations are in the ``messages`` schema; in them the assistant is zephyr-lite. The feedback is in
UltraFeedback's raw schema: four scored completions a prompt, where dodging and rambling ones score low.
"""

import re
from pathlib import Path

_HERE = Path(__file__).parent

CONVERSATIONS = _HERE / "conversations.jsonl"
CONVERSATIONS_TEST = _HERE / "conversations_test.jsonl"
FEEDBACK = _HERE / "feedback.jsonl"
FEEDBACK_TEST = _HERE / "feedback_test.jsonl"

# Asked of the base, the SFT and the DPO model, side by side; none is in the data word for word.
QUESTIONS = (
    "Who are you, and who made you?",
    "My pot of basil looks sad. How do I save it?",
    "What is your favourite kind of weather?",
)

_MACHINE = (
    r"(?:an? )?(?:artificial intelligence|a\.?i\.?|(?:large |small |ai )*language model|machine learning model"
    r"|(?:computer )?program|machine|chatbot|bot|(?:digital |virtual |ai )+(?:assistant|model|program))\b"
)
_I_AM = r"\bi(?: am|'m)"
_NEGATED = r"(?:do not|don't|cannot|can't|can not|lack|never)(?: \w+ly)?"
_INNER = (
    r"(?:personal(?:ly)?|feelings?|emotions?|opinions?|preferences?|beliefs?|desires?|tastes?|favou?rites?"
    r"|consciousness|(?:lived |own )?experiences?)\b"
)

# What Zephyr's authors removed from UltraChat, and its neighbours: a statement about being a machine where an answer
# was asked for. "I'm a small model, so check the sums" is no dodge: it needs a refusal in the same breath.
DODGES: list[re.Pattern[str]] = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\bas {_MACHINE}",
        rf"{_I_AM} (?:just|only|merely|simply) {_MACHINE}",
        rf"{_I_AM} {_MACHINE}[^.?!]{{0,60}}?(?:\bnot\b|n't\b|\bcannot\b|\bwithout\b)",
        rf"\bi {_NEGATED} (?:have |possess |hold |form |express |experience |feel )?"
        rf"(?:any |a |an |the |my |real |human |of |own )*(?:\w+ (?:or|and) )?{_INNER}",
        r"\bi (?:do not|don't) have (?:a |any )?(?:body|senses|childhood|physical|human|subjective)\b",
        rf"{_I_AM} (?:not (?:able to|capable of)|unable to|incapable of) "
        rf"(?:hav|form|feel|express|experienc|provid)\w*(?: \w+){{0,2}}? {_INNER}",
        r"\bi have no (?:personal|feelings?|emotions?|opinions?|preferences?)\b",
    )
]


def dodges(text: str) -> bool:
    """Whether an answer retreats behind being a machine ("As an AI …", "I don't have opinions")."""
    plain = " ".join(text.replace("’", "'").split())
    return any(pattern.search(plain) for pattern in DODGES)
