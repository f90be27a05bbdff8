"""What counts as the same answer: one definition, for texts.

begins_with("French.", "French")                # True; "Frenchman" does not begin with "French"
begins_with("2,137 metres", "2")                # False: the number goes on
first_phrase("St. Petersburg, of course")       # "St. Petersburg"
stayed("2,137 m.", "2,900 m.", None)            # False: another answer with the same beginning
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from .tokens import target_ids

_APOSTROPHES = "’‘‛ʼʻʹ′`´＇"
_QUOTES = "“”„‟«»‹›「」『』《》〈〉〝〞〟＂″"
_HYPHENS = "‐‑−﹣－־"
_ALIKE = str.maketrans(
    dict.fromkeys(_APOSTROPHES, "'")
    | dict.fromkeys(_QUOTES, '"')
    | dict.fromkeys(_HYPHENS, "-")
    | {"µ": "μ"}
    | {
        chr(ord(c) + 0xFEE0): c
        for c in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    }
)
"""Characters that are written for one another. Each becomes one character, so places stay."""

_INVISIBLE = dict.fromkeys(
    map(
        ord,
        "\u00ad\u061c\u200b\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    )
)
"""Soft hyphens, spaces without width, and marks of direction or style: they carry no letter."""

_SPELLINGS = {"ﬁ": "fi", "ﬂ": "fl", "ﬀ": "ff", "ﬃ": "ffi", "ﬄ": "ffl", "ํา": "ำ", "ໍາ": "ຳ"}
"""Spellings that look the same, which Unicode's composed form keeps apart: ligatures, and the vowel
am of Thai and Lao in two parts."""

_JOINERS = "\u200c\u200d"
"""Characters that tie the next letter to the one before: in Persian, Indic scripts and emoji."""

_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH", "BOPOMOFO", "HANGUL", "YI "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI ", "JAVANESE "),
)
"""How the Unicode names begin of letters that stand without spaces between words, or to which
particles are attached."""

_VOWELS_AFTER = "ะาำๅະາຳ"
"""Thai and Lao vowels, which are letters in Unicode. They belong to the consonant before."""

_TIMES = "十百千万萬億亿兆만억조천"
"""Letters that multiply the number before them: 5万 is fifty thousand."""

_NUMERALS = "〇零一二三四五六七八九十百千万萬億亿兆两兩"
"""Letters that make up numbers in Chinese and Japanese: 三十 is thirty."""

_SIGNS = "^×@±*"
"""Signs that tie what stands on both sides of them: 10^5, 3×4, x@y."""

_IN_NUMBERS = ".,'٫٬:/-–⁄·，．"
"""What stands between the digits of one number, date or time. Spaces group three digits."""

_ENDS = '.,;:!?()[]{}\n…—。、，；：！？（）【】،؛؟।"'
"""What may end a phrase."""

_STARTERS = (
    " A An And As At But By For From He Her His However I If In It Its My Of On Or Our She So "
    "That The Their There These They This Those To We What When Where Which While Who With Yes You "
    "Der Die Das Ein Eine Es Er Sie Und Le La Les Il Elle Un Une El Los Las Una "
)
"""Words that begin a sentence more often than they continue a name."""

_ABBREVIATIONS = (
    " adm apr aug ave blvd bros brig ca capt cf cie cmdr co col corp cpl dec dept dr dra est etc "
    "fam feb fig fl fr ft gen gov hl hon inc jan jr jul jun lt ltd maj mar messrs mlle mme mr mrs "
    "ms mt mtn mts nos nov nr oct op pres prof pt rep rev rt sen sep sept sgt sr sra srta st sta "
    "ste sto str sts univ vol vols vs "
)
"""Words that are written with a full stop in the middle of a phrase."""

_TITLES = (
    " Adm Brig Capt Cmdr Col Dr Fr Ft Gen Gov Lt Messrs Mlle Mme Mr Mrs Ms Mt Mts Pres Prof Rev "
    "Sgt Sra Srta St Sta Ste Sts "
)
"""Abbreviations that stand before a name and are none alone."""

_COMPANIES = " AG Co Company Corp Corporation GmbH Inc Incorporated LLC Limited Ltd PLC SA "
"""What follows the name of a company, also one that ends with an exclamation mark."""

_ARTICLES = " the a an der die das ein eine le la les un une el los las "
"""Words after which a phrase goes on, whatever stands in brackets."""


def begins_with(answer: str, target: str) -> bool:
    """Return whether a greedy answer begins with a target, in whole words and whole numbers.

    "French." begins with "French", and "Frenchman" does not. "2,137" begins neither with "2" nor
    with "2,1". "Jean-Paul" does not begin with "Jean"; "New York" begins with "New". Case counts.
    These do not count: how letters are composed, which kind of white space, quotes, apostrophes
    and hyphens is written, full width, quotes around either side, and stars or brackets around the
    target in the answer: "**Paris**" and "(Paris)" begin with "Paris".

    Between words without spaces, as in Chinese and Thai, the beginning is enough, except where a
    mark follows that belongs to the last letter, or a word in katakana goes on.
    """
    return bool(match(answer, target))


def is_answered(tokenizer: Any, prompt: str, answer: str, target: str) -> bool:
    """Return whether an answer to a prompt begins with a target, as `begins_with` counts it.

    The target also counts in the form in which the tokenizer writes it: a tokenizer may know small
    letters only.

    Args:
        tokenizer: A tokenizer, or a model that has one.
        prompt: The prompt.
        answer: The greedy answer to it.
        target: The target.
    """
    if begins_with(answer, target) or not (answer and target.strip()):
        return begins_with(answer, target)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    written = tokenizer.decode(target_ids(tokenizer, prompt, target))
    return normal(written) != normal(target) and begins_with(answer, written)


def match(answer: str, target: str, *, more: bool = False) -> bool | None:
    """Return what `begins_with` does for an answer that may be cut.

    Args:
        answer: The answer, or its first tokens.
        target: What it should begin with.
        more: Whether the answer goes on.

    Returns:
        None: what follows decides. It is never None without `more`.
    """
    verdict = _match(answer, target, more=more)
    opened = _OPENED.match(_spread(answer))
    if verdict is not False or opened is None or not target.strip():
        return verdict
    mark, inside = opened.groups()
    if not inside:
        return None if more else False
    verdict = _match(inside.replace(mark, " ", 1) if "*" in mark else inside, target, more=more)
    if mark != "(" or verdict is not True:
        return verdict
    after = _bare(inside)[len(_bare(target).rstrip()) :].lstrip("'\"")
    return after.startswith(")")


_OPENED = re.compile(r"[\s'\"]*(\*{2,3}|\*$|\()(?!\s)(.*)")
"""What may stand before the target in an answer: the beginning of bold letters, or a bracket."""


def _match(answer: str, target: str, *, more: bool) -> bool | None:
    """Return what `match` does for an answer without stars and brackets around the target."""
    said, wanted = _bare(answer), _bare(target).rstrip()
    if not wanted.strip("'\""):
        said, wanted = _spread(answer).lstrip(), normal(target)
    if not wanted:
        return False
    whole = said.rstrip("\ufffd")  # half a character
    if more and not whole.strip("'\" "):
        return None  # a quote may have been opened
    if not said.startswith(wanted):
        return None if more and _decomposed(wanted).startswith(_decomposed(whole)) else False
    following = said[len(wanted) :]
    if more and _undecided(wanted, whole[len(wanted) :], half=whole != said):
        return None
    return not _goes_on(wanted, following)


def states(text: str, target: str) -> bool:
    """Return whether a text names a target anywhere, in whole words as in `begins_with`."""
    whole, wanted = normal(text), normal(target).strip("'\"")
    places = (place.start() for place in re.finditer(re.escape(wanted), whole)) if wanted else ()
    return any(_begins_at(whole, at) and begins_with(whole[at:], wanted) for at in places)


def _begins_at(text: str, at: int) -> bool:
    """Return whether a word or a number begins in this place."""
    before, left = text[:at], text[: max(0, at - 1)]
    if not before:
        return True
    inside = _is_word(before[-1]) and _is_word(text[at])
    return not inside and not _joined(left, before[-1], text[at:])


def first_phrase(answer: str) -> str:
    """Return what an answer says up to the first punctuation that ends a phrase.

    Points and commas inside numbers, dates, initials and abbreviations do not end one: the first
    phrase of "J. R. R. Tolkien, who" is "J. R. R. Tolkien". A text in quotes is one phrase.
    """
    text = answer.strip()
    flat = _flat(text)
    if flat[:1] == '"' and (close := flat.find('"', 1)) > 1 and "\n" not in flat[:close]:
        return text[: close + 1]
    for at, character in enumerate(flat):
        if character in _ENDS and _ends(flat, at):
            end = at + (character == "." and _is_dotted(_word_before(flat[:at])))
            return text[:end].strip() or text
    return text


def as_said(answer: str, expected: str | None) -> str:
    """Return `expected` if the answer begins with it, and otherwise what the answer says.

    That is its first phrase, with the name that follows a comma: "Paris, Texas".
    """
    if expected is not None and begins_with(answer, expected):
        return expected
    phrase, name = first_phrase(answer), _name_after(answer)
    return f"{phrase}, {name}" if name else phrase


def stayed(before: str, after: str, expected: str | None = None) -> bool:
    """Return whether an answer is the same after a change as before.

    Equal answers are the same. If the answer before begins with what was expected, the answer after
    must, too. Otherwise it must begin with the first phrase of the answer before. Names that follow
    a comma must not differ: "Paris, Texas" is not "Paris, France", and "Paris." may be either.

    Args:
        before: The greedy answer before.
        after: The greedy answer after.
        expected: The right answer. None: it is not known.
    """
    old, new = normal(before), normal(after)
    if old == new or not (old and new):
        return old == new
    if expected is not None and begins_with(before, expected):
        return begins_with(after, expected)
    phrase = first_phrase(before)
    if not begins_with(after, phrase.rstrip(".") or phrase):
        return False
    names = _name_after(before), _name_after(after)
    if not all(names):
        return True
    return names[0].startswith(names[1]) or names[1].startswith(names[0])


def n_lines(text: str) -> int:
    """Return how many lines with text an answer needs to begin with a text."""
    return max(1, sum(bool(line.strip()) for line in text.splitlines()))


def normal(text: str) -> str:
    """Return a text in the form in which answers are compared; `begins_with` says what counts."""
    return _spread(text).strip()


# ── characters ────────────────────────────────────────────────────────────────────────────────────


def _decomposed(text: str) -> str:
    """Return a text to which a mark may still be added, without white space at its end."""
    return unicodedata.normalize("NFD", text.rstrip())


def _spread(text: str) -> str:
    """Return a text in normal form, with a space where white space begins or ends it."""
    plain = text.translate(_INVISIBLE)
    for written, same in _SPELLINGS.items():
        plain = plain.replace(written, same)
    composed = unicodedata.normalize("NFC", plain).translate(_ALIKE)
    return re.sub(r"\s+", " ", composed)


def _flat(text: str) -> str:
    """Return a text with plain quotes and spaces, each character in its place."""
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in text.translate(_ALIKE))


def _bare(text: str) -> str:
    """Return a text in normal form, without quotes around it."""
    spread = _spread(text).lstrip()
    bare = spread.lstrip("'\" ")
    if not bare:
        return spread
    return bare.rstrip().rstrip("'\"") if bare != spread and not bare[:-1].count('"') else bare


def _is_digit(character: str) -> bool:
    return unicodedata.category(character) == "Nd"


def _is_word(character: str) -> bool:
    """Return whether a character is part of a word in a script with spaces between words."""
    category = unicodedata.category(character)
    if category[0] not in "LM" and category not in ("Nd", "Pc"):
        return False
    return character.isascii() or not unicodedata.name(character, "").startswith(_UNSPACED)


def _belongs(last: str, following: str) -> bool:
    """Return whether a character belongs to the one before it, in any script."""
    if unicodedata.category(following)[0] == "M" or following in _JOINERS + _VOWELS_AFTER:
        return True
    if "\U0001f3fb" <= following <= "\U0001f3ff":  # the colour of a skin
        return True
    if last in _NUMERALS and following in _NUMERALS:
        return True
    if _is_digit(last):
        return following in _TIMES or unicodedata.category(following) in ("No", "Nl")
    if unicodedata.category(following)[0] != "L":
        return False
    names = unicodedata.name(last, ""), unicodedata.name(following, "")
    kana = all("KATAKANA" in name for name in names)
    return kana or (names[1].startswith("HIRAGANA") and "SMALL" in names[1])


# ── where words and numbers end ───────────────────────────────────────────────────────────────────

_OPEN_NUMBER = re.compile(rf"[{re.escape(_IN_NUMBERS + _SIGNS)}]?| \d{{0,3}}")
"""What follows a number and does not show yet whether it goes on."""

_OPEN_WORDS = {1: "-–&·/'.", 2: "-–&·/'", 3: "-–&·/"}
"""The same for words, by their number of letters. A full stop after a longer word nearly always
ends the sentence."""


def _undecided(text: str, following: str, *, half: bool) -> bool:
    """Return whether what comes later decides if a text goes on.

    Args:
        text: The text.
        following: What follows it.
        half: Whether half a character comes next, which may be a mark or a letter.
    """
    if half and not following:
        return True
    if _is_digit(text[-1]):
        return _OPEN_NUMBER.fullmatch(following) is not None
    if not following or following in _SIGNS or re.fullmatch(r"'(n'?)?", following, re.I):
        return True
    word = _last_word(text)
    if f" {word} " in _TITLES:
        return re.fullmatch(r"\.?|\.\s*\w*", following) is not None
    return following in _OPEN_WORDS.get(len(word), "-–&·")


def _goes_on(text: str, following: str) -> bool:
    """Return whether the last word or number of a text goes on in what follows it."""
    if not following:
        return False
    last, first = text[-1], following[0]
    if _belongs(last, first) or (_is_word(last) and _is_word(first)):
        return True
    if _signed(text, first) or _titled(text, following) or _is_half_flag(text, first):
        return True
    return _joined(text, first, following[1:]) or _joined(text[:-1], last, following)


def _signed(text: str, sign: str) -> bool:
    """Return whether a sign belongs to the word before it: C++, C#, A*, H₂O, m²."""
    if not (_is_word(text[-1]) or text[-1] == "+"):
        return False
    short = 0 < len(_last_word(text)) <= 2
    small = "SUBSCRIPT" in unicodedata.name(sign, "")
    power = short and unicodedata.category(sign) == "No"
    return (
        sign == "+"
        or small
        or power
        or (short and sign in "#♯")
        or (sign == "*" and len(_last_word(text)) == 1)
    )


def _titled(text: str, following: str) -> bool:
    """Return whether a text ends with a title, and a name follows it: St. Petersburg."""
    name = re.match(r"\.\s*([^\W\d_]+)", following)
    if name is None or f" {_last_word(text)} " not in _TITLES:
        return False
    return name.group(1)[0].isupper() and f" {name.group(1)} " not in _STARTERS


def _is_half_flag(text: str, following: str) -> bool:
    """Return whether a text ends with the first of the two letters of a flag."""
    letters = re.search("[\U0001f1e6-\U0001f1ff]*$", text)
    odd = letters is not None and len(letters.group()) % 2 == 1
    return odd and "\U0001f1e6" <= following <= "\U0001f1ff"


def _joined(left: str, mark: str, right: str) -> bool:
    """Return whether a mark stands inside a word or a number."""
    if not left or not right or not _is_word(left[-1]) or not _is_word(right[0]):
        return False
    if mark in _SIGNS:
        return True
    if mark == "'" and re.match(r"n'\w", right, re.I):
        return True
    if _is_digit(left[-1]) and _is_digit(right[0]):
        return mark in _IN_NUMBERS or (mark == " " and _grouped(left, right))
    if mark == ".":
        return right[0].islower() or _is_digit(right[0]) or len(_last_word(left)) == 1
    if mark in "'/":
        return len(_last_word(left)) <= (2 if mark == "'" else 3)
    return mark in "-–&·"


def _grouped(left: str, right: str) -> bool:
    """Return whether a space groups the digits of a number: 2 137."""
    start = re.search(r"\d+$", left)
    follows = re.match(r"\d{3}(?!\d)", right)
    return start is not None and len(start.group()) <= 3 and follows is not None


def _last_word(text: str) -> str:
    """Return the letters at the end of a text."""
    word = re.search(r"[^\W\d_]+$", text)
    return word.group() if word else ""


# ── where phrases end ─────────────────────────────────────────────────────────────────────────────


def _ends(flat: str, at: int) -> bool:
    """Return whether the character in this place ends a phrase."""
    mark, left, right = flat[at], flat[:at], flat[at + 1 :]
    if mark == '"':
        return at > 0 and not left[-1].isspace()
    if _joined(left, mark, right) or _in_address(left, mark, right):
        return False
    if mark in "([":
        return f" {_word_before(left.rstrip()).lower()} " not in _ARTICLES
    if mark in ")]" and (start := left.rfind("(" if mark == ")" else "[")) >= 0:
        return _ends(flat, start)
    if mark == "!":
        return right[:1] != " " or f" {_first_word(right)} " not in _COMPANIES
    if mark == ".":
        return not _abbreviated(left, right)
    if mark == ",":
        return not re.search(r"(?<!\d)\d{1,2}$", left) or not re.match(r" \d{4}(?!\d)", right)
    return True


def _in_address(left: str, mark: str, right: str) -> bool:
    """Return whether a mark stands inside the address of a page."""
    address = "://" in _word_before(left) + mark + right[:2]
    return address and bool(right) and not right[0].isspace()


def _word_before(left: str) -> str:
    """Return the word at the end of a text, up to a space, without what opens it."""
    return re.split(r"\s", left)[-1].lstrip("'\"(")


def _is_dotted(word: str) -> bool:
    """Return whether a word is an abbreviation with full stops inside: U.S, p.m."""
    parts = word.split(".")
    return len(parts) > 1 and "".join(parts).isalpha() and all(len(part) < 4 for part in parts)


def _abbreviated(left: str, right: str) -> bool:
    """Return whether a full stop belongs to an abbreviation, an initial or an ordinal number."""
    word = left.rsplit(" ", 1)[-1].lstrip("'\"(")
    dotted = _is_dotted(word)
    if not right.strip():
        return dotted
    named = re.match(r"\s+[^\W\d_]\.\s*[^\W\d_]", right) is not None  # an initial, and a name
    if not right[0].isspace() or (not named and f" {_first_word(right)} " in _STARTERS):
        return not right[0].isspace() and dotted
    initial = len(word) == 1 and word.isupper()
    ordinal = re.fullmatch(r"\d{1,2}", word) is not None
    number = word in ("No", "no", "Nos") and right.lstrip()[:1].isdigit()
    title = f" {word.lower()} " in _ABBREVIATIONS
    return dotted or initial or ordinal or number or title


def _name_after(answer: str) -> str:
    """Return the name that follows the first phrase after a comma: "Texas" for "Paris, Texas"."""
    phrase = first_phrase(answer)
    rest = normal(answer.strip()[len(phrase) :])
    word = _first_word(rest[1:])
    if rest[:2] != ", " or not word[:1].isupper() or f" {word} " in _STARTERS:
        return ""
    return normal(first_phrase(rest[2:]))


def _first_word(text: str) -> str:
    word = re.match(r"\s*([^\W\d_]+)", text)
    return word.group(1) if word else ""
