"""Which texts are trained on and which are held out, decided by the text alone."""

import hashlib


def fraction(text: str, salt: str = "") -> float:
    """The place of `text` on the line [0, 1), the same on every machine and wherever it stands in a file.

    Texts that differ only in case or white space share a place, so a duplicate never crosses into another split.
    Another `salt` gives another, independent place.
    """
    normal = " ".join(text.lower().split())
    digest = hashlib.blake2b(normal.encode(errors="surrogatepass"), key=salt.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # 53 bits: what a float holds without rounding up to 1
