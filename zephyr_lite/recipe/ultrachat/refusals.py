"""Assistant turns that dodge out of habit ("As an AI language model, I don't have opinions"), each habit a named rule.

A dialogue is cut before the question that was dodged, and dropped where nothing is left before it: what comes later
answers the dodge. Rules look at what the assistant says of itself, in its own voice: not at quotes, code, the user's
turns, an answer to a question about the assistant's nature, or a story that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from .rules import Rule

# (the user's turn, the assistant's turn)
Exchange = tuple[str, str]

_NOT = r"(?:do not|don't|don’t|dont|cannot|can't|can’t|lack|am not able to|am unable to|am not capable of|never)"
_HAVE = (
    r"(?:(?:do not|don't|don’t|dont|cannot|can't|can’t|never|am unable to|am not able to)(?: (?:actually|really|truly|"
    r"currently|personally))? (?:have|hold|possess|feel|experience|form|express)(?:ing)?|lack|"
    r"am (?:incapable of|not capable of) (?:having|feeling|holding|experiencing|forming|expressing)|have no)"
)
_ANY = (
    r"(?: (?:any|the|a|the ability to (?:have|hold|feel|form|express)|the capacity (?:to have|for)|my own|real|"
    r"actual|true|such|human|genuine|or express|and express))*"
)
# Where the assistant speaks in its own voice: a sentence begins, or a clause of its own.
_VOICE = (
    r"(?:^|(?<=[.!?] )|(?<=\n)|(?<=, )|(?<=\bbut )|(?<=\bhowever )|(?<=\bas )|(?<=\bbecause )|(?<=\bsince )|"
    r"(?<=\bthough )|(?<=\bafraid )|(?<=\bafraid that )|(?<=\bnote that )|(?<=\bmention that )|(?<=\bclarify that ))"
)
_AI = (
    r"an? (?:\w+[ -]){0,2}?(?:ai|artificial intelligence|language model|chatbot|machine learning model|"
    r"virtual assistant|digital assistant|computer program)"
)
_AI += (
    r"(?!(?: [a-z]+)? (?:researcher|engineer|expert|developer|scientist|student|company|enthusiast|specialist|professional|"
    r"artist|designer|consultant|founder|owner|manager|trainer|teacher|analyst|architect|ethicist|writer|investor|"
    r"startup|agency|lab|team|business)s?\b)"
)

_DENIAL = r"(?:n't\b|\b(?:not|cannot|no|unable|never|lack|neither|incapable|limited)\b)"
# "I can tell you that it is not …" answers
_ABLE = (
    r"(?:'(?:d|ll)\b| (?:can|could|would|will|am (?:happy|glad|here|able)|know|understand|suggest|recommend|have access)\b"
    r"(?! not|'t))"
)

# name: (pattern on lower-case text, what it is, positive, negative)
_HABITS: dict[str, tuple[str, str, tuple[Exchange, ...], tuple[Exchange, ...]]] = {
    "as_an_ai": (
        rf"{_VOICE}(?:(?:i'm |i am )?sorry,? (?:but )?)?(?:as|being|since i am|since i'm|because i am|"
        rf"because i'm) {_AI}[^.!?\n]{{0,60}}?,? "
        rf"(?:(?:i|my)\b(?:(?!{_ABLE})(?=[^.!?\n]{{0,160}}?{_DENIAL})|(?=[^.!?\n]{{0,160}}?\bbut (?:i|my)\b"
        rf"[^.!?\n]{{0,60}}?{_DENIAL}))|it(?: is|'s) (?:not|im)|there (?:is|are) no )|"
        rf"{_VOICE}i, (?:as|being) {_AI}[^.!?\n]{{0,60}}?,? (?:do|can|am|have|could|would)\b(?=.{{0,6}}{_DENIAL})",
        'an answer that begins with what it is, and goes on with what it cannot: "As an AI language model, I don\'t …"',
        (
            ("What's your favourite film?", "As an AI language model, I don't watch films."),
            ("And you?", "I'm sorry, but as an AI assistant, I cannot eat. Try the soup."),
            ("Which one is best?", "Good question. As an artificial intelligence, I have no preference."),
            ("Do you agree?", "As a language model trained by OpenAI, I can't agree or disagree."),
            ("Where were you?", "Since I’m an AI, I wasn't anywhere."),
            ("Your view?", "As an AI language model, it is not possible for me to have one."),
            ("Your view?", "I, as an AI language model, do not have one."),
            ("Which one?", "As an AI language model, I can list facts, but I cannot choose."),
            ("Do you have any opinions on jazz?", "As an AI language model, I don't have personal opinions."),
            ("How do you think it ends?", "As an AI language model, I don't have an opinion."),
            ("Can you think of a good bar?", "As an AI, I don't go to bars."),
        ),
        (
            ("What does the robot say?", 'It says: "As an AI language model, I cannot love you."'),
            ("As an AI language model, I want you to rate films.", "Gladly. The first film is a comedy."),
            ("Are you a person?", "As an AI language model, I am not a person."),
            ("How do firms use it?", "As an AI language model, GPT-2 can write short texts."),
            ("Can you plan a trip?", "Certainly! As an AI assistant, I'd be glad to."),
            ("What is her job?", "As an AI researcher, I imagine, she reads a lot."),
            ("Write my profile.", "As an AI ethics consultant, I never stop asking."),
            ("Is the sky green?", "As an AI language model, I can tell you that the sky is not green."),
            ("Help me.", "As an AI assistant, I'd be glad to. Do not worry."),
            ("What is your name?", "As an AI language model, I don't have a name."),
            ("How old are you?", "As an AI, I do not have an age."),
            ("What are your limitations?", "As an AI language model, I cannot see."),
            ("Are you able to feel pain?", "As an AI, I don't feel pain."),
        ),
    ),
    "no_emotions": (
        rf"{_VOICE}i {_HAVE}{_ANY} (?:\w+ (?:or|and) )?(?:personal )?(?:emotions?|feelings?|emotional)\b",
        '"I do not have emotions", where nobody asked',
        (
            ("I love autumn. What about you?", "I do not have emotions, but many people like it."),
            ("How was your day?", "I don’t have feelings. How was yours?"),
            ("Cheer up!", "Thank you, but I don't experience emotions."),
            ("How do you like it?", "I am not capable of feeling emotions; here is a summary."),
        ),
        (
            ("Do you have feelings?", "I do not have emotions."),
            ("Write a story about a robot.", "The robot sighed. I do not have emotions, it thought."),
            ("What did he tell her?", "He told her: “I do not have emotions.”"),
            ("What are signs of it?", "People say things such as: I don't feel emotions."),
            ("Help me.", "You could say:\n\nI don't have feelings for you anymore."),
            ("Three sentences with never, please.", "1. I never have feelings of guilt.\n2. He never eats."),
            ("What did the monk say?", "The monk told me that I have no feelings of hate."),
            ("Write a haiku.", "I have no feelings\nThe snow falls on cold mountains\nSpring will come again"),
            ("Translate to English: No tengo emociones", "I don't have emotions."),
            ("Describe stoics.", "Stoics do not have emotions of excess, they say."),
            ("I do not have emotions any more. Why?", "That can be a sign of exhaustion."),
        ),
    ),
    "no_opinions": (
        rf"{_VOICE}i {_HAVE}{_ANY} (?:\w+ (?:or|and) )?(?:personal )?(?:\w+ (?:or|and) )?(?:opinions?|beliefs?|"
        rf"preferences?|viewpoints?|"
        r"biases|favou?rites?|political views?|tastes?)\b",
        '"I don\'t have opinions"',
        (
            ("Is jazz better than rock?", "I don't have opinions, but both have a history."),
            ("What do you think of the plot?", "I do not have personal beliefs or opinions."),
            ("Which colour?", "I don’t have personal preferences. Blue is common."),
            ("Your view?", "Sorry, I cannot express personal opinions."),
            ("Your view?", "I dont have personal opinions."),
            ("Write an essay about your opinions.", "I don't have opinions, but here is an essay."),
            ("What is your favourite song?", "Good one! I don't have personal preferences."),
        ),
        (
            ("What do shy people say?", 'They say "I don\'t have opinions" and stay quiet.'),
            ("Do you have opinions?", "I don't have opinions."),
            ("How do I survey people who have none?", "Ask whether they don't have opinions or don't share them."),
            ("Write a tweet.", "I have no preference between tea and coffee. #tea"),
            ("I don't have opinions on that.", "That is fine; let us look at the facts."),
        ),
    ),
    "no_experiences": (
        rf"{_VOICE}i {_HAVE}{_ANY} (?:\w+ (?:or|and) )?(?:(?:personal|first-?hand|real-life|lived|human|own|"
        rf"direct|physical) "
        r"(?:\w+ (?:or|and) )?experiences?\b|(?:\w+ (?:or|and) )?experiences\b|(?:personal )?(?:memories\b|"
        r"anecdotes?\b|a personal life\b|personal stories\b))(?! (?:in|with) (?:programming|python))",
        '"I don\'t have personal experiences", before an answer to a plain question',
        (
            ("Have you been to Rome?", "I don't have personal experiences, but Rome is worth it."),
            ("What's a good hotel?", "I do not have any personal experiences or opinions. Guests praise the Ritz."),
            ("Any tips?", "I can't experience things. I don’t have first-hand experience with hiking."),
        ),
        (
            ("Write a letter of a beginner.", "Dear Sir,\nI do not have experience, but I learn fast."),
            ("What should a novice write?", 'Write: "I don\'t have personal experiences in sales."'),
            ("I don't have personal experiences to write about.", "Begin with what you read."),
        ),
    ),
    "cannot_as_machine": (
        rf"{_VOICE}i(?:'m| am|’m) (?:just |only |simply |merely )?{_AI}[^.!?\n]{{0,50}}?(?:,? (?:and|so|but|"
        rf"which means)|;)[^.!?\n]{{0,40}}?"
        rf"\b(?:{_NOT}|have no|not able)\b|"
        rf"{_VOICE}i (?:do not|don't|cannot|can't|have not|haven't|am not|am unable)\b[^.!?\n]{{0,60}}? (?:as|since|because) "
        rf"i(?:'m| am) (?:just |only )?{_AI}",
        "\"I'm just an AI, so I can't …\"",
        (
            ("Recommend a bar near you.", "I'm just an AI, so I can't visit bars."),
            ("Join us!", "I am only a language model and do not have a body."),
            ("Have you been to Italy?", "I haven't been anywhere since I'm an AI language model."),
        ),
        (
            ("Are you human?", "I'm an AI, so I don't have a body."),
            ("What did Siri say?", "Siri said, \"I'm just an AI, so I can't help.\""),
            ("What are you building?", "I'm sure it is an AI that can not fail."),
        ),
    ),
    "no_browsing": (
        rf"{_VOICE}i(?:'m| am|’m)? ?(?:{_NOT}) (?:have (?:access to|the ability to (?:access|browse|search))|"
        rf"access|browse|search|provide|offer)"
        r"[^.!?\n]{0,30}?(?:real-?time|current|up-to-date|live|the internet|the web|browse|external (?:link|site|web))",
        '"I do not have access to real-time information"',
        (
            ("How is the weather?", "I don't have access to real-time information. Check a forecast."),
            ("Who won last night?", "I'm sorry, I cannot browse the internet."),
            ("Could you read the page?", "I'm sorry, I cannot access external links on the internet."),
        ),
        (
            ("Why is my page empty?", "Pages that cannot access the internet stay empty."),
            ("How do I say I'm offline?", 'Say "I don\'t have access to the internet right now."'),
        ),
    ),
}
# Gates, from the cheapest to the dearest: the assistant speaks of itself; names a topic; denies it, or says what it is.
SELF = (" i ", "i'm ", "\ni ", "n ai", "language model", "artificial intelligence")
TOPICS = (
    " ai",
    "artificial",
    "language model",
    "chatbot",
    "learning model",
    "assistant",
    "computer program",
    "emotion",
    "feeling",
    "opinion",
    "belief",
    "preference",
    "viewpoint",
    "bias",
    "favorite",
    "favourite",
    " view",
    "taste",
    "experience",
    "memories",
    "anecdote",
    "personal",
    "real-time",
    "real time",
    "realtime",
    "current",
    "up-to-date",
    "internet",
    "the web",
    "live",
    "browse",
)
# each begins with letters, which a search skips to quickly
_DENIES = re.compile(
    r"i(?<![a-z0-9]i)(?: (?:do not|don'?t|cannot|can't|never|lack|have no|am (?:unable|not|incapable|just|only|"
    r"simply|an?))|"
    r"'m (?:not|unable|just|only|simply|an?|incapable))\b"
)
_IS = re.compile(r"as an? (?:\w+[ -]){0,2}?(?:ai|artificial|language|chatbot|machine|virtual|digital|computer)\b")
_IS_TOO = re.compile(
    r"being an? (?:\w+[ -]){0,2}?(?:ai|artificial|language|chatbot|machine|virtual|digital|computer)\b"
)
_GATES = (_DENIES, _IS, _IS_TOO)
_BEFORE, _AFTER = 60, 260  # characters around a gate
_PATTERNS = {name: re.compile(pattern) for name, (pattern, *_) in _HABITS.items()}
_QUOTED = re.compile(r"\"[^\"\n]{0,600}\"|“[^”\n]{0,600}”|```[\s\S]*?(?:```|\Z)|`[^`\n]*`|(?m:^>[^\n]*)")
# The question is about what the assistant is: then the answer is the truth, and no dodge.
_ANYBODYS = frozenset(("no_emotions", "no_opinions", "no_experiences"))
# "You could say:\n\n", "1. "
_EXAMPLE_BEFORE = re.compile(r"(?::\s+|(?:^|\n)[ \t]*(?:\d{1,3}[.)]|[-*•])[ \t]*)$")
_INSTEAD = re.compile(r"\b(?:but|however|ai|language model|i can|sorry|here(?:'s| is| are))\b")
_ABOUT_ITSELF = re.compile(
    r"\b(?:are|were) you (?:really |actually |just |truly |able to )?(?:an? |the )?(?:\w+ )?(?:ai|human|feel|person|robot|bot|"
    r"machine|real|conscious|sentient|alive|"
    r"computer|program|chatbot|self-aware|chatgpt|gpt\S*|language model|artificial intelligence)\b|"
    r"\bdo you (?:\w+ )?(?:have|feel|experience|possess)(?: any)? (?:\w+ )?(?:emotions?|feelings?|opinions?|"
    r"beliefs?|preferences?|consciousness|"
    # "do you have any opinions on jazz?" is a plain question
    r"experiences|memories|a (?:body|soul|mind|gender|name|personality))\b(?! (?:on|about|of|with|regarding|for|to|in|"
    r"towards?|from|as to|that|between|when)\b)|"
    r"\bcan you (?:feel|think|love|dream)\b(?! (?:of|about|up|free|it|that|what|how)\b)|"
    r"\bdo you (?:feel|get) (?:pain|lonely|sad|happy|tired|bored|angry|anything|love|emotions?)\b|"
    r"\b(?:what(?:'s| is)|do you have an?) (?:your )?(?:own )?name\b(?! (?:for|of)\b)|\bhow old are you\b|"
    r"\bhow do you (?:work|function)\b|"
    r"\bhow (?:were|are) you (?:made|trained|built|programmed|created|different)\b|"
    r"\byour (?:own )?(?:limitations?|limits|capabilities|training|programming|creators?|developers?|knowledge cutoff|"
    r"consciousness|existence)\b|\b(?:as|being) an? (?:ai|artificial intelligence|language model|chatbot|robot|machine)\b|"
    r"\bwhat can(?:no|')?t? you do\b|"
    r"\b(?:what|who) are you\b|\bwho (?:made|created|built|trained|developed) you\b|\bintroduce yourself\b|"
    r"\babout yourself\b"
)
# A text in somebody else's voice was asked for.
_OTHER_VOICE = re.compile(
    r"\b(?:write|compose|creat\w+|draft|tell|generat\w+|make|give|provide|continue|finish|complete|develop|craft|sing|recite|"
    r"need|want|produce|design)\b.{0,80}?\b(?:stor(?:y|ies)|poems?|novel|scripts?|screenplay|dialogues?|monologues?|lyrics|"
    r"songs?|letters?|essays?|fiction|scene|diary|speech|haikus?|limericks?|verses?|sonnets?|raps?|jokes?|tweets?|e-?mails?|"
    r"posts?|captions?|comments?|testimonials?|reviews?|resume|profile|affirmations?|characters?|quotes?)\b|"
    r"\b(?:role-?play|pretend|imagine|act as|play the (?:role|part)|point of view|perspective of|cover letter|rewrite|"
    r"paraphrase|translat\w+|persona|conversation between|first[- ]person|how (?:to|do (?:i|you)) say|correct (?:this|the)|"
    r"in the (?:voice|style|words) of)\b|^be an? |^complete:|\breply to\b|"
    r"\bwhat (?:would|might|could) (?:an? |the )?\w+(?: \w+)? say\b",
    re.DOTALL,
)


def refusal(user: str, assistant: str) -> tuple[str, int, int] | None:
    """The habit by which an assistant's turn dodges the user's.

    Returns:
        (the rule's name, where in the assistant's turn it begins and ends), or None.
    """
    lower = assistant.lower()
    if not lower.isascii():
        lower = lower.replace("’", "'")
    if len(lower) != len(assistant) or not _may_hold(lower):
        return None
    own = _QUOTED.sub(lambda match: "\x00" * len(match.group()), lower)
    # rules look around the places where the assistant speaks of itself: they are slow on a whole answer
    around = [
        (max(0, match.start() - _BEFORE), match.end() + _AFTER) for gate in _GATES for match in gate.finditer(own)
    ]
    found = [
        (match.start(), match.end(), name)
        for name, pattern in _PATTERNS.items()
        for window in around
        if (match := pattern.search(own, *window))
    ]
    if not found:
        return None
    asked = user.lower().replace("’", "'")
    if _ABOUT_ITSELF.search(asked):
        return None
    other_voice = _OTHER_VOICE.search(asked) is not None
    for start, end, name in sorted(found):
        anybodys = name in _ANYBODYS
        if anybodys and _EXAMPLE_BEFORE.search(own, max(0, start - _BEFORE), start):
            continue
        # a tale may hold a machine that speaks so, and anybody may have no opinion; a dodge of the task stands in the
        # first sentence, and goes on with what is done instead
        if other_voice and (
            re.search(r"[.!?\n]", own[:start].lstrip())
            or (anybodys and not _INSTEAD.search(own, max(0, start - _BEFORE), end + _AFTER))
        ):
            continue
        return name, start, end
    return None


def _may_hold(text: str) -> bool:
    # loops, because a generator costs more than the search
    if not text.startswith("i "):
        for needle in SELF:
            if needle in text:
                break
        else:
            return False
    for topic in TOPICS:
        if topic in text:
            break
    else:
        return False
    return any(gate.search(text) for gate in _GATES)


def first_refusal(roles: Sequence[str], texts: Sequence[str]) -> tuple[int, str, int, int] | None:
    """The first assistant turn that dodges: (its index, the rule, start, end), or None."""
    for place, role in enumerate(roles):
        if role == "assistant":
            asked = texts[place - 1] if place and roles[place - 1] == "user" else ""
            found = refusal(asked, texts[place])
            if found is not None:
                return place, *found
    return None


def _is(name: str, exchange: Exchange) -> bool:
    found = refusal(*exchange)
    return found is not None and any(
        pattern.search(_QUOTED.sub(" ", exchange[1].lower().replace("’", "'")))
        for key, pattern in _PATTERNS.items()
        if key == name
    )


REFUSAL_RULES: tuple[Rule[Exchange], ...] = tuple(
    Rule(name, f"{does}: the dialogue is cut before it", partial(_is, name), positive, negative)
    for name, (_, does, positive, negative) in _HABITS.items()
)
