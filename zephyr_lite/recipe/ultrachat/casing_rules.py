"""The rules by which capitals are restored, with examples; ``casing.changes`` applies them."""

from __future__ import annotations

from functools import partial

from .casing import broken, changes
from .english import is_english
from .lexicon import Lexicon
from .rules import Rule


def _example_lexicon() -> Lexicon:
    """What the examples know: a corpus of four dialogues."""
    lexicon = Lexicon()
    for _ in range(4):
        lexicon.forms.update(
            ("Anna", "Toulouse", "PyTorch", "iPad", "bank", "white", "house", "may", "May", "rose", "Rose")
        )
        lexicon.pairs.update(("White House", "Van Gogh"))
        lexicon.both.update(("white house", "van gogh"))
    return lexicon


_LEXICON = _example_lexicon()


def _applies(name: str, text: str) -> bool:
    return any(change.rule == name for change in changes(text, _LEXICON))


# name: (what it does, positive, negative)
_CASING: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "turn_start": (
        "the first word of a turn",
        ("hello there.", '"why not?" she said.', "1. preheat the oven.", "  so it goes."),
        ("Hello there.", "3 apples are enough.", "`code` comes first.", "iPhone users know.", "привет. как дела?"),
    ),
    "after_terminator": (
        "the first word after . ! or ?, closing and opening quotes and brackets between",
        (
            "Hello. how are you?",
            "Stop! you must rest.",
            'He said "no." then he left.',
            "Is it? (yes, it is.)",
            "In 1999. the war was over.",
            "It costs 3.50. that is cheap.",
            "I saw it.\u00a0then I left.",
            "So do I. she too.",
            "(It was so.) then he left.",
        ),
        (
            "We met Dr. who knew it.",
            "Use tools, e.g. a hammer.",
            "The U.S. economy grew.",
            "At 5 p.m. we left.",
            "Well... maybe.",
            "Wait… what?",
            '"Really?" he asked.',
            "It costs 3. 50 more.",
            "See example.com/a.b is next to x_1.y too.",
            "Cats, dogs, etc. are pets.",
            "Inc. is short.",
            "Hello. How are you?",
            "Run `a. b` now.",
            "J. smith came.",
            '"A boy runs." is true.',
            "Ah! *giggles* I see.",
            "All n! permutations.",
            "As Smith et al. found, it is so.",
            "He said (why not?) that he would (what a day!) leave.",
            'I like "Help!" by the Beatles.',
            "Well . . . maybe.",
            "Yahoo! is old.",
            "Let it be small. x is small.",
            "No. ßeta is two letters in capitals.",
        ),
    ),
    "after_title": (
        "the name after Mr., Dr. and the like",
        ("We met Dr. jones there.", "Ask mrs. robinson."),
        ("We met Dr. Jones there.", "The dr is in."),
    ),
    "list_item": (
        "the first word of a list's item that is a sentence, or has a colon",
        (
            "So:\n- wash your hands first.\n",
            "Do:\n1. preheat the oven to 180.\n2. mix",
            "a. What is it?\nb. where is it from",
        ),
        ("Options:\n- yes\n- no", "Items:\n- eggs", "Do:\n- Wash them well now."),
    ),
    "line_start": (
        "the first word after a blank line, or after a line that ends a sentence",
        (
            "It is so.\n\nthen it ended.",
            "It is so.\r\n\r\nthen it ended.",
            "It is so:\nhere it comes.",
            "See:\n```\nx\n```\nthis prints x.",
        ),
        (
            "a line that goes\non in the next",
            "def f(x):\n    return x",
            "Area:\n```\nn * s\n```\nwhere n is",
            "It is so.\n\nThen it ended.",
            "roses are red,\nviolets are blue",
        ),
    ),
    "lone_i": (
        "the pronoun I",
        (
            "Then i went.",
            "Yes, i'm here.",
            "the part i like",
            "(you and i)",
            "so i’ve heard",
            "You and i, too.",
            '"i think so"',
            "That is what i do.",
        ),
        (
            "for i in range",
            "if i = 3 then",
            "i.e. this",
            "(i) first, (ii) second",
            "the i-th row",
            "a[i] is",
            "`i`",
            "Then I went.",
            "the index i is",
            "the unit i satisfies",
            "where i is the row",
            "Let i denote it.",
            "the vowels a, e, i, o, u",
            "the numerals i, ii and iii",
            "first i) this; ii) that",
            "so, i. e. this",
            "run npm i next",
            "x_i and",
            "List:\ni. one\n",
            "pi is",
            "wi-fi",
            "Translate: Qualitat Obres i Raiding, a més de les entitats de Manresa i de Sabadell.",
            'the terms "i" here',
            "-44*i + 41*i. We",
        ),
    ),
    "known_name": (
        "a word that the corpus writes with a capital inside sentences",
        (
            "I met anna there.",
            "We use pytorch and it works.",
            "near toulouse, they say",
            "I saw anna's car.",
            "non-american cars",
        ),
        (
            "I met Anna there.",
            "the bank is open",
            "it may rain",
            "a rose is red",
            "see anna@example.org",
            "my_anna",
            "the code-anna",
            "20 ms a step",
        ),
    ),
    "known_phrase": (
        "a pair of words that the corpus writes with capitals together",
        ("He lives in the white house now.",),
        ("a white wall and a house", "the White House", "in the house", "by Vincent van Gogh"),
    ),
}
CASING_RULES: tuple[Rule[str], ...] = tuple(
    Rule(name, does, partial(_applies, name), positive, negative)
    for name, (does, positive, negative) in _CASING.items()
)

DETECTION_RULES: tuple[Rule[tuple[str, ...]] | Rule[str], ...] = (
    Rule(
        "broken_capitals",
        "a speaker whose later sentences or whose I are in lower case",
        lambda turns: broken([turns])[0],
        (
            ("Hello. how are you?",),
            ("That's great! i love it.", "Thanks. can you tell me more? i need it."),
            ("I see, but i don't know.",),
            ("Well done. It works. but i see no end. why?",),
        ),
        (
            ("Hello. How are you?",),
            ("hello",),
            ("Use tools, e.g. a hammer. Then stop.",),
            ("Run this. Now see:\n```\nfoo. bar\nfor i in x:\n```\nDone.",),
            ("It is so. It was so. It will be so. It could be. by chance one is wrong. All else is right. Good.",),
            ("Ciao. come stai? Mi piacciono i libri e i gatti della nonna. che bello",),
            ("Привет. как дела?",),
        ),
    ),
    Rule(
        "english",
        "a text that the rules for English may be applied to",
        is_english,
        ("The cat is on the table.", "ok. thanks", "What is the meaning of “Weltschmerz”?"),
        (
            "Der Hund ist nicht auf dem Tisch.",
            "Je ne sais pas où il est.",
            "你好。我很好。",
            "Mi piacciono i libri e non la TV.",
        ),
    ),
)
