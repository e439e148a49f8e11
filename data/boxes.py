r"""`\boxed{}` in a text: where the boxes are, and what is in them. Left out: what an answer is worth.

A backslash escapes: `\{` opens nothing. The time is linear in the length of the text.
"""

import re

OPENING = r"\\(?:boxed|fbox)\s*\{"
TOKEN = re.compile(rf"{OPENING}|\\.|[{{}}]", re.DOTALL)


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""The boxes that lie in no other: (begin, end, what is inside), in order. `\fbox` is one too.

    A box that is not closed ends with the text, has nothing inside, and does not hide those in it.
    """
    found: list[tuple[int, int, str | None]] = []
    opened: list[tuple[int, int, int]] = []  # where a box begins, where its content does, how deep it lies
    depth = 0
    for token in TOKEN.finditer(text):
        if token[0][-1] == "{" and token[0] != r"\{":
            if token[0] != "{":
                opened.append((token.start(), token.end(), depth))
            depth += 1
        elif token[0] == "}" and depth:
            depth -= 1
            if opened and depth == opened[-1][2]:
                begin, inside, _ = opened.pop()
                while found and found[-1][0] > begin:
                    found.pop()
                found.append((begin, token.end(), text[inside : token.start()].strip()))
    return sorted(found + [(begin, len(text), None) for begin, _, _ in opened])


def last_box(text: str) -> str | None:
    r"""What is in the last `\boxed{}`; None if there is none, or if it is not closed."""
    found = boxes(text)
    return found[-1][2] if found else None
