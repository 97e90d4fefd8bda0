"""What a run is called, and which texts may stand in a record: they reach terminals, pages, figures and file names.

Records are sent by strangers. A name must not pass for another variant's, write outside its folder, move a terminal's
cursor or be set as a formula; the same rules hold for what is typed here, before anything runs.
"""

import hashlib
import json
import re
import unicodedata

from lib import attention

LONGEST_NAME = 80  # characters of a label or a title: more is no row of a table
LONGEST_TEXT = 10_000  # characters of any other text
WHO = ("attention", "options", "label", "seed")  # what differs within a study; all else is its setting
BESIDE = ("save_model",)  # what changes nothing that is measured, so neither names a run nor sets it apart
# Parameters that came later, and what runs from before them did: with that value a run is the same as theirs.
LATER = {"position_embedding": "learned", "architecture": "gpt2", "convolution": 0, "match": "none"}

# Letters that are drawn like Latin ones and that Unicode's compatibility forms leave apart, each before the one that it
# looks like (Unicode TS 39, those of which a name in Latin letters can be made): Cyrillic, Greek, Armenian, Latin.
LOOK_LIKE = (
    "аa вb сc ԁd еe ғf ԍg һh нh іi јj кk ӏl мm оo рp ԛq гr ѕs тt ѵv ԝw хx уy "
    "αa βb εe ηn ιi κk νv οo ρp τt υu χx ϲc ɑa ɡg ɩi ıi ʟl ɴn ʀr ꜱs ʏy ᴀa ᴅd ᴇe ƒf ɢg ʜh ᴍm ᴘp ᴛt օo սu ոn ցg հh աw զq"
)
LOOK_LIKE = {ord(letter): latin for letter, latin in LOOK_LIKE.split()}
INVISIBLE = "\u115f\u1160\u3164\uffa0"  # which count as letters
ALIKE_IN_ASCII = str.maketrans("01|!5", "oliis")


def setting(values: dict) -> str:
    """Eight hex digits of everything but the variant and the seed: runs are compared only where these agree."""
    return digest({name: value for name, value in measured(values).items() if name not in WHO})


def measured(values: dict) -> dict:
    """The parameters that what is measured follows from."""
    later = {name for name, value in LATER.items() if values.get(name, value) == value}
    return {name: value for name, value in values.items() if name not in later and name not in BESIDE}


def run_name(values: dict) -> str:
    """The name of a run's record and notebook: variant, seed and a hash of all parameters."""
    return f"{file_stem(display_name(values))}-seed{values['seed']}-{digest(measured(values))}"


def display_name(values: dict) -> str:
    """What tells a run apart from others: its label, or its variant's or pattern's name."""
    return values["label"] or attention.label(values["attention"])


def digest(values: dict) -> str:
    """Eight hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def file_stem(text: str) -> str:
    """A text as the part of a file's name: no folder, no ending that counts, nothing that a shell reads."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)


def printable(text, most: int = 500) -> str:
    """A text of whatever origin as one line that can be shown: what is not printable as its escape, the rest cut."""
    line = " ".join(str(text).split())[: most + 1]
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def cleaned(value):
    """JSON's values, such as a machine's facts, with every text made `printable`."""
    if isinstance(value, dict):
        return {printable(name): cleaned(one) for name, one in value.items()}
    if isinstance(value, list):
        return [cleaned(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def check_name(text: str, what: str) -> str:
    """A label or a title, which figures and tables show. Raises ValueError, in one line, where it cannot be shown."""
    shown = f"{what} {text[:40]!a}"
    if not 0 < len(text) <= LONGEST_NAME:
        raise ValueError(f"{shown} must have 1 to {LONGEST_NAME} characters, not {len(text)}")
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{shown} must be printable, on one line, and without spaces at its ends")
    if "$" in text or "\\" in text:
        raise ValueError(f"{shown} must have no $ and no \\, which make a formula of it")
    if text.startswith("_"):
        raise ValueError(f"{shown} must not begin with _, which a figure's legend leaves out")
    return text


def check_label(label: str, of_attention: str) -> str:
    """A run's `display_name`. Raises ValueError, in one line, where it cannot be shown or passes for another variant's.

    The names of the study's variants are keys: `sdpa` is what ratios are taken to.
    """
    check_name(label, "label")
    owners = {name: name for name in attention.variants()} | {attention.CONTROL: attention.REFERENCE}
    known = next((name for name in owners if looks_like(label, name)), None)
    if known is not None and of_attention not in (owners[known], f"lib/attention/{owners[known]}.py"):
        raise ValueError(
            f"label {label!a} is, or looks like, the name of the study's {known}, which {printable(of_attention, 80)} "
            "is not; give it a label of its own"
        )
    return label


def looks_like(text: str, name: str) -> bool:
    """Whether a text could be read as a variant's name, which is in ASCII: case, signs and look-alike letters aside.

    In a text of Latin and other letters, each other letter may stand for any.
    """
    found, wanted = skeleton(text), skeleton(name)
    if found == wanted or len(found) != len(wanted):
        return found == wanted
    is_mixed = any(one.isascii() for one in found) and not found.isascii()
    return is_mixed and all(a == b or not a.isascii() for a, b in zip(found, wanted, strict=True))


def skeleton(text: str) -> str:
    """Letters and digits of a text as they look: accents, case and signs dropped, look-alikes made one."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    letters = "".join(one for one in plain if (one.isalnum() or one in "|!") and one not in INVISIBLE)
    letters = letters.translate(LOOK_LIKE)
    return letters.translate(ALIKE_IN_ASCII).replace("rn", "m").replace("vv", "w").replace("i", "l")
