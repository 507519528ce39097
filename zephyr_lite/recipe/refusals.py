"""Assistant turns that refuse out of habit ("As an AI language model, I don't have opinions"), by named rules.

A dialogue is cut before the question that was refused, as later turns answer the refusal, and dropped if nothing remains. The
rules look at what the assistant says of itself in its own voice: not at quotes, code, the user's turns, an answer to a
question about the assistant, or a story that was asked for.
"""

from __future__ import annotations

import re

# patterns on lower-case text with straight apostrophes
_NOT = r"(?:do not|don't|dont|cannot|can't|lack|am not able to|am unable to|am not capable of|never)"
_HAVE = (
    r"(?:(?:do not|don't|dont|cannot|can't|never|am unable to|am not able to)(?: (?:actually|really|truly|currently|"
    r"personally))? (?:have|hold|possess|feel|experience|form|express)(?:ing)?|lack|"
    r"am (?:incapable of|not capable of) (?:having|feeling|holding|experiencing|forming|expressing)|have no)"
)
_ANY = (
    r"(?: (?:any|the|a|the ability to (?:have|hold|feel|form|express)|the capacity (?:to have|for)|my own|real|"
    r"actual|true|such|human|genuine|or express|and express))*"
)
# the start of a sentence, or of a clause of the assistant's own
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

_OR = r"(?:\w+ (?:or|and) )?"
_LACK = rf"{_VOICE}i {_HAVE}{_ANY} {_OR}"

# name → pattern
REFUSALS = {
    "as_an_ai": (
        rf"{_VOICE}(?:(?:i'm |i am )?sorry,? (?:but )?)?(?:as|being|since i am|since i'm|because i am|"
        rf"because i'm) {_AI}[^.!?\n]{{0,60}}?,? "
        rf"(?:(?:i|my)\b(?:(?!{_ABLE})(?=[^.!?\n]{{0,160}}?{_DENIAL})|(?=[^.!?\n]{{0,160}}?\bbut (?:i|my)\b"
        rf"[^.!?\n]{{0,60}}?{_DENIAL}))|it(?: is|'s) (?:not|im)|there (?:is|are) no )|"
        rf"{_VOICE}i, (?:as|being) {_AI}[^.!?\n]{{0,60}}?,? (?:do|can|am|have|could|would)\b(?=.{{0,6}}{_DENIAL})"
    ),
    "no_emotions": rf"{_LACK}(?:personal )?(?:emotions?|feelings?|emotional)\b",
    "no_opinions": (
        rf"{_LACK}(?:personal )?{_OR}(?:opinions?|beliefs?|preferences?|viewpoints?|biases|favou?rites?|political views?|tastes?)\b"
    ),
    "no_experiences": (
        rf"{_LACK}(?:(?:personal|first-?hand|real-life|lived|human|own|direct|physical) {_OR}experiences?\b|{_OR}experiences\b|"
        r"(?:personal )?(?:memories\b|anecdotes?\b|a personal life\b|personal stories\b))(?! (?:in|with) (?:programming|python))"
    ),
    "cannot_as_machine": (
        rf"{_VOICE}i(?:'m| am) (?:just |only |simply |merely )?{_AI}[^.!?\n]{{0,50}}?(?:,? (?:and|so|but|which means)|;)"
        rf"[^.!?\n]{{0,40}}?\b(?:{_NOT}|have no|not able)\b|"
        rf"{_VOICE}i (?:do not|don't|cannot|can't|have not|haven't|am not|am unable)\b[^.!?\n]{{0,60}}? (?:as|since|because) "
        rf"i(?:'m| am) (?:just |only )?{_AI}"
    ),
    "no_browsing": (
        rf"{_VOICE}i(?:'m| am)? ?(?:{_NOT}) (?:have (?:access to|the ability to (?:access|browse|search))|"
        rf"access|browse|search|provide|offer)"
        r"[^.!?\n]{0,30}?(?:real-?time|current|up-to-date|live|the internet|the web|browse|external (?:link|site|web))"
    ),
}
# Around one of these the patterns are searched, which would be slow on a whole answer. Each begins with letters, to which a
# search skips quickly.
_GATES = (
    re.compile(
        r"i(?<![a-z0-9]i)(?: (?:do not|don'?t|cannot|can't|never|lack|have no|am (?:unable|not|incapable|just|only|"
        r"simply|an?))|'m (?:not|unable|just|only|simply|an?|incapable))\b"
    ),
    re.compile(
        r"(?:as|being) an? (?:\w+[ -]){0,2}?(?:ai|artificial|language|chatbot|machine|virtual|digital|computer)\b"
    ),
)
_BEFORE, _AFTER = 60, 260  # characters around a gate
_PATTERNS = {name: re.compile(pattern) for name, pattern in REFUSALS.items()}
_QUOTED = re.compile(r"\"[^\"\n]{0,600}\"|“[^”\n]{0,600}”|```[\s\S]*?(?:```|\Z)|`[^`\n]*`|(?m:^>[^\n]*)")
# rules whose sentences a person may say as well
_OF_PEOPLE = frozenset(("no_emotions", "no_opinions", "no_experiences"))
# "You could say:\n\n", "1. "
_EXAMPLE_BEFORE = re.compile(r"(?::\s+|(?:^|\n)[ \t]*(?:\d{1,3}[.)]|[-*•])[ \t]*)$")
_INSTEAD = re.compile(r"\b(?:but|however|ai|language model|i can|sorry|here(?:'s| is| are))\b")
# a question about the assistant: the answer is true, and no refusal
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
# a request for a text in another voice
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
    """The rule by which an assistant's turn refuses the user's: (its name, start and end in the assistant's turn), or None."""
    lower = assistant.lower().replace("’", "'")
    if len(lower) != len(assistant) or not any(gate.search(lower) for gate in _GATES):
        return None
    own = _QUOTED.sub(lambda match: "\x00" * len(match.group()), lower)
    found = []
    for gate in (match for pattern in _GATES for match in pattern.finditer(own)):
        for name, pattern in _PATTERNS.items():
            if match := pattern.search(own, max(0, gate.start() - _BEFORE), gate.end() + _AFTER):
                found.append((match.start(), match.end(), name))
    if not found:
        return None
    asked = user.lower().replace("’", "'")
    if _ABOUT_ITSELF.search(asked):
        return None
    other_voice = _OTHER_VOICE.search(asked) is not None
    for start, end, name in sorted(found):
        of_people = name in _OF_PEOPLE
        if of_people and _EXAMPLE_BEFORE.search(own, max(0, start - _BEFORE), start):
            continue
        # a story may have a machine that says so; a refusal of the task is the first sentence, and an alternative follows
        if other_voice and (
            re.search(r"[.!?\n]", own[:start].lstrip())
            or (of_people and not _INSTEAD.search(own, max(0, start - _BEFORE), end + _AFTER))
        ):
            continue
        return name, start, end
    return None
