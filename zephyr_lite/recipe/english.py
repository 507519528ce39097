"""Whether a text is English, and the words that English always writes with a capital."""

from __future__ import annotations

import re


def word_list(text: str) -> list[str]:
    """Words that are written in the source as running text."""
    return text.split()


_FUNCTION_WORDS = frozenset(
    word_list("""
the a an and or but of to in on at for with from by is are was were be been it this that these those you your we our
they their he she his her my me not no do does did can could will would should have has had what which who how why
when where there here if as so about into than then also please hello hi thanks thank yes okay ok tell give write make
explain describe list some any more great sure wow
""")
)
# frequent words of other languages in Latin script that are not English
_FOREIGN_WORDS = frozenset(
    word_list("""
der die das und ist nicht ein eine ich sie wir mit auf für von zu den dem que el los las una por para con del es está
como pero le les des du est et une dans pour qui pas sur avec il di che un per non sono della gli och att det som är
på en av inte jag nie się na jest w z do że to ik het een van niet de na os um uma não em com se mais voce je ve bir
bu için ile değil çok og er til af ikke jeg på ja nej ne da li su za sa
""")
) - {"do", "to", "a", "in", "on", "me", "no", "he", "so", "an", "at", "is", "ve"}
_LOOK = 500  # characters
_WORD = re.compile(r"[^\W\d_]+")
_NOT_LATIN = re.compile(r"[^\W\d_a-zA-ZÀ-ɏḀ-ỿ]")


def is_english(text: str) -> bool:
    """Whether a text has more function words of English than of other languages.

    With equally many ("ok. thanks") a text is English if it is ASCII; with more than a twentieth of its characters in another
    script it is not.
    """
    if not text.isascii() and len(_NOT_LATIN.findall(text)) * 20 > len(text):
        return False
    words = _WORD.findall(text[:_LOOK].lower())
    ours = len(list(filter(_FUNCTION_WORDS.__contains__, words)))
    theirs = len(list(filter(_FOREIGN_WORDS.__contains__, words)))
    if ours == theirs:
        return text.isascii()
    return ours > theirs


# The lexicon adds the names of the corpus, and decides on names that are common words, too (may, march, china, polish).
_CAPITALISED = word_list("""
monday tuesday wednesday thursday friday saturday sunday january february april june july september october november
december christmas easter halloween hanukkah ramadan diwali thanksgiving english french german spanish italian
portuguese dutch greek latin russian ukrainian chinese japanese korean vietnamese thai hindi urdu bengali arabic
hebrew persian turkish swedish norwegian danish finnish icelandic irish scottish welsh british american canadian
mexican brazilian argentinian chilean peruvian cuban colombian australian indian pakistani indonesian malaysian
filipino egyptian ethiopian kenyan nigerian moroccan iranian iraqi israeli lebanese syrian saudi african asian
european swiss austrian belgian hungarian romanian bulgarian croatian serbian czech slovak catholic protestant
christian muslim jewish hindu buddhist sikh islam islamic christianity judaism hinduism buddhism europe asia africa
america australia antarctica oceania atlantic arctic mediterranean caribbean england scotland wales ireland britain
france germany spain italy portugal netherlands belgium luxembourg switzerland austria poland czechia slovakia hungary
romania bulgaria greece croatia serbia slovenia albania ukraine russia belarus estonia latvia lithuania finland sweden
norway denmark iceland canada mexico guatemala honduras nicaragua panama cuba jamaica haiti colombia venezuela ecuador
peru bolivia brazil paraguay uruguay argentina chile egypt libya tunisia algeria morocco sudan ethiopia kenya uganda
tanzania rwanda nigeria ghana senegal cameroon congo angola zambia zimbabwe botswana namibia mozambique madagascar
israel palestine lebanon syria iraq iran kuwait qatar yemen afghanistan pakistan india nepal bhutan bangladesh myanmar
thailand laos cambodia vietnam malaysia singapore indonesia philippines taiwan japan korea mongolia kazakhstan
uzbekistan london paris berlin madrid rome vienna moscow tokyo beijing shanghai delhi mumbai sydney melbourne toronto
vancouver chicago boston seattle houston dallas philadelphia washington california texas florida alaska hawaii arizona
colorado michigan illinois ohio virginia oregon utah nevada manhattan brooklyn hollywood google microsoft facebook
instagram twitter wikipedia linkedin mr mrs ms dr
""")
_WRITTEN = word_list("""
YouTube LinkedIn JavaScript GitHub iPhone iPad WhatsApp NASA NATO UNESCO DNA RNA HTML CSS SQL CEO USA TV
""")

ALWAYS: dict[str, str] = {
    **{word: word.capitalize() for word in _CAPITALISED},
    **{word.lower(): word for word in _WRITTEN},
}
