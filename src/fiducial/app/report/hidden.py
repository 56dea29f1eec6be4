"""Characters that a reader cannot see, or that change how the text around them looks, written out by their number."""

from __future__ import annotations

import unicodedata

SHOWN_AS_THEY_ARE = "\n\t"

# not of a hidden category, yet without ink: fillers, and the variation selectors in which text can be smuggled
WITHOUT_INK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(c) for c in range(0xE0100, 0xE01F0)}

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: controls, format marks (among them bidirectional overrides, zero widths and tags), surrogates, separators."""


def visible(text: str) -> str:
    r"""`text` with each hidden character as its number; line ends become newlines, which stay, as tabs do.

    >>> visible("a\u202eb\x1b[31m\r\n")
    'a⟨U+202E⟩b⟨U+001B⟩[31m\n'
    """
    text = text.replace("\r\n", "\n")
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in SHOWN_AS_THEY_ARE or (unicodedata.category(character) not in HIDDEN and character not in WITHOUT_INK):
        return character
    return f"⟨U+{ord(character):04X}⟩"
