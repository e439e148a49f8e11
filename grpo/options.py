"""Read a frozen flat dataclass from a command line or a YAML file. Every error is one sentence.

A flag and a recipe key are both a field's name with a text, and one reader handles both. So `1e-5`, `1` and `true` mean
the same in both. The traps of YAML 1.1 do not exist: `1e-5` as a string, `no` as a boolean, `010` as eight. Left out:
nested options, positional arguments, and what the options mean (`config.py`).
"""

import dataclasses
import difflib
import sys
import types
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from grpo.files import write_whole

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], prog: str) -> T:
    """Read a command line. `--name value` flags override `--recipe FILE`, which overrides the defaults.

    Args:
      kind: flat dataclass. Its fields are str, int, float, bool, Literal, tuples of one of them, or unions of these
        with None. A tuple is read from words separated by commas or white space. With `metadata={"verbatim": True}`
        each argument is one item, as it is.
      argv: the arguments without the program's name: `--name value ...` or `--name=value`. A bool without a value is
        True. If a name is repeated, the last one counts.
      prog: the program's name, for messages.

    Returns:
      The dataclass.

    Raises:
      SystemExit: with code 2 after an error, whose sentence is on stderr, or with 0 after `--help`.
    """
    try:
        flags = _flags(argv, kind)
        own = any(field.name == "recipe" for field in dataclasses.fields(kind))  # then --recipe is an option of `kind`
        recipe = None if own else flags.pop("recipe", None)
        below = {} if recipe is None else _recipe(kind, _read(str, recipe, "--recipe"))
        if "help" in flags:
            _print_help(kind, prog, below)
        return _build(kind, below | {name: (f"--{name}", value) for name, value in flags.items()})
    except OSError as error:  # nothing but the recipe is opened here
        sentence = f"--recipe is {error.filename!r}: must be a file that can be read ({error.strerror})"
    except ValueError as error:
        sentence = str(error)
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def read_yaml(kind: type[T], path: str | Path) -> T:
    """Read a dataclass from a YAML file of `name: value` lines. Missing fields get their defaults.

    Raises:
      ValueError: a key is unknown or repeated, a value has a wrong type or range, or the file has another form.
      OSError: the file cannot be read.
    """
    return _build(kind, _recipe(kind, path))


def write_yaml(options: Any, path: str | Path) -> None:
    """Write every field, so that `read_yaml` gives an equal dataclass. A crash leaves the old file or the new one."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    write_whole(Path(path), yaml.safe_dump(values, sort_keys=False))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint `; did you mean X?`, or an empty text if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _flags(argv: list[str], kind: type) -> dict[str, str | list[str]]:
    """`--name a b --other=c --switch` -> {"name": ["a", "b"], "other": "c", "switch": "true"}."""
    known = [field.name for field in dataclasses.fields(kind)] + ["recipe", "help"]
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in argv:
        if word == "-h" or word.startswith("--"):
            name, equals, value = ("help" if word == "-h" else word[2:]).partition("=")
            name = name.replace("-", "_")
            if name not in known:
                raise ValueError(f"--{name} is not an option{did_you_mean(name, known) or '; see --help'}")
            values = flags[name] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word!r} comes before the first option: write --name value; see --help")
        else:
            values.append(word)
    hints = get_type_hints(kind)
    bare = {name: "true" for name, texts in flags.items() if not texts and hints.get(name) is bool}
    return {name: texts[0] if len(texts) == 1 else texts for name, texts in flags.items()} | bare


def _recipe(kind: type, path: str | Path) -> dict[str, tuple[str, Any]]:
    """Read a YAML file as {field: (its place, for messages; text or list of texts)}. Scalars stay as written."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines")
    known = [field.name for field in dataclasses.fields(kind)]
    for name in content:
        if name not in known:
            raise ValueError(f"{name} in {path} is not an option{did_you_mean(name, known) or '; see --help'}")
    keys = [key.value for key, _ in node.value] if content else []
    if len(keys) > len(content):
        raise ValueError(f"{max(keys, key=keys.count)} stands more than once in {path}")
    return {name: (f"{name} in {path}", value) for name, value in content.items()}


def _build(kind: type[T], raw: dict[str, tuple[str, Any]]) -> T:
    """Make the dataclass from {field: (its place, for messages; text or list of texts)}."""
    hints = get_type_hints(kind)
    missing = [name for name in _required(kind) if name not in raw]
    if missing:
        raise ValueError(f"--{missing[0]} is missing; see --help")
    verbatim = {field.name for field in dataclasses.fields(kind) if field.metadata.get("verbatim")}
    as_it_is = {name: tuple([x] if isinstance(x, str) else x) for name, (_, x) in raw.items() if name in verbatim}
    read = {name: _read(hints[name], x, where) for name, (where, x) in raw.items() if name not in verbatim}
    return kind(**read | as_it_is)


def _required(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def _print_help(kind: type, prog: str, below: dict[str, tuple[str, Any]]) -> None:
    """Print every field with its docstring and its default (or the recipe's value), and exit."""
    import tyro  # slow to import, and only needed here

    default = {}
    with suppress(ValueError):  # a required field is missing: show the fields' own defaults
        default["default"] = _build(kind, below)
    markers = (tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff)
    tyro.cli(kind, prog=prog, args=["--help"], use_underscores=True, config=markers, **default)


def _read(hint: Any, value: Any, where: str) -> Any:
    """Convert a text, or a list of texts, to the type `hint`. A ValueError names `where` and what is allowed."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    parts = sorted(parts, key=lambda part: part is not type(None))  # None first, or `str` would accept it
    for part in parts:
        try:
            return _read_as(part, value)
        except (ValueError, KeyError, AttributeError):
            continue
    raise ValueError(f"{where} is {value or 'empty'!r}: must be {' or '.join(map(_describe, parts))}")


_BOOL = {"true": True, "false": False}
_NULL = dict.fromkeys(("None", "none", "null", "~", ""))
_NO_TEXT = ("None", "null", "~", "")  # these mean None. `none` is missing: some tables have an entry of this name
_FLOAT = {".inf": "inf", "-.inf": "-inf"}  # how YAML writes it -> how Python reads it


def _read_as(hint: Any, value: Any) -> Any:
    """Convert to one member of a union. A value that does not fit raises ValueError, KeyError or AttributeError."""
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_read_as(get_args(hint)[0], word) for item in items for word in item.replace(",", " ").split())
    if get_origin(hint) is Literal:
        return {str(choice): choice for choice in get_args(hint)}[value.strip()]
    if hint is bool:
        return _BOOL[value.lower()]
    if hint is type(None):
        return _NULL[value.strip()]
    if hint is float:
        return float(_FLOAT.get(value.lower(), value))
    if hint is str and value.strip() in _NO_TEXT:
        raise ValueError("a text is needed here")
    return hint(value.strip())


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each item {_describe(get_args(hint)[0])}"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}[hint]
