"""Text as the little model should see it: plain punctuation, no broken encodings, no foul words."""

import re

# What people paste from word processors; a small vocabulary has no room for two kinds of quotes.
_PLAIN = str.maketrans(
    {
        "“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "′": "'", "″": '"', "‚": ",", "—": "-",
        "–": "-", "―": "-", "…": "...", "\xa0": " ", "\u2003": " ", "\u2029": "\n", "\u200b": None,
        "\u200e": None, "\ufeff": None, "\ufffd": None,
    }
)  # fmt: skip
# UTF-8 that was once read as Windows-1252.
_BROKEN = re.compile("[âÃ][\u0080-\u00ff€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]{1,2}")
# A conversation with one of these is left out. Violence in fairy tales is kept, in talk it is not.
_FOUL = re.compile(
    r"\b(f+u+c+k\w*|\w*shit\w*|bitch\w*|cunts?|dicks?|pussy|nigg\w*|fag|faggots?|retard\w*|whores?"
    r"|sluts?|bastards?|ass|asses|asshole\w*|damn\w*|crap\w*|piss\w*|porn\w*|sex\w*|boobs?|nude\w*"
    r"|naked|hooker\w*|rape[ds]?|rapist\w*|rapes|suicid\w*|overdos\w*|cocaine|heroin|meth|weed"
    r"|marijuana|stoned|nazis?|hitler|holocaust|terroris\w*|isis|massacre\w*|molest\w*|pedophil\w*"
    r"|abortion\w*|racis\w*|sexis\w*|trump|obama|clinton)\b",
    re.IGNORECASE,
)
_UNKIND = re.compile(
    r"\b(stupid|idiots?|moron\w*|dumb|ugly|loser\w*|hate you|shut up|kill\w*|murder\w*|gun|guns"
    r"|bomb\w*|drugs?|drunk|beer|vodka|whiskey)\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """One line of talk, or one paragraph a line of a story."""
    text = _BROKEN.sub(_mend, text).translate(_PLAIN)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def paragraphs(text: str) -> str:
    """As `clean`, for texts whose lines break within sentences: those are joined."""
    parts = re.split(r"\n\s*\n", _BROKEN.sub(_mend, text).translate(_PLAIN))
    joined = []
    for part in parts:
        lines = [" ".join(line.split()) for line in part.splitlines()]
        for line in filter(None, lines):
            if joined and joined[-1] and joined[-1][-1] not in '.!?":':
                joined[-1] += " " + line
            else:
                joined.append(line)
    return "\n".join(joined)


def is_foul(text: str) -> bool:
    """Whether the text has a word that the model must not learn to say."""
    return _FOUL.search(text) is not None


def is_kind(text: str) -> bool:
    """Whether an assistant may say this: neither foul nor unkind."""
    return not is_foul(text) and _UNKIND.search(text) is None


def _mend(match: re.Match[str]) -> str:
    # Five bytes have no character in Windows-1252; they arrive as control characters.
    codes = (c.encode("latin-1") if c < "\xa0" else c.encode("cp1252", "replace") for c in match[0])
    try:
        return b"".join(codes).decode("utf-8")
    except UnicodeDecodeError:
        # A closing quote whose third byte was lost on the way.
        return match[0].replace("â€", '"')
