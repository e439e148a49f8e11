"""Read a frozen flat dataclass from a command line or a YAML file, and check it. Every error is one sentence.

An option is one field. Its line has name, type, default, range and further facts; its docstring says what it means.
Reading, checking and `--help` need nothing else. One reader handles flags and recipe keys, so `1e-5`, `1` and `true`
mean the same in both. The traps of YAML 1.1 do not exist: `1e-5` as a string, `no` as a boolean, `010` as eight. Left
out: nested options, positional arguments, and what the options mean (`config.py`).
"""

import ast
import dataclasses
import inspect
import itertools
import math
import operator
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from data.options import did_you_mean
from grpo.files import write_whole

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, allowed: str = "", **facts: Any) -> Any:
    """A field of a dataclass of options, with what is known of it beside its name, its type and its docstring.

    Args:
      default: without one, the option must be given.
      allowed: the range of a number, or of each item of a tuple: `>= 0`, `> 0 and finite`, `>= 0 and < 2**63`.
      facts: `distinct=True`: a tuple has items, and none twice. `verbatim=True`: each argument on the command line is
        one item of a tuple, as it is. `was="x"`: its earlier name, for the message. All others are for those who
        ask with `facts_of`.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, **facts})


def facts_of(kind: type, fact: str) -> dict[str, Any]:
    """{option: its fact of this name}, for the options that have it."""
    return {field.name: field.metadata[fact] for field in dataclasses.fields(kind) if field.metadata.get(fact)}


def followed(options: Any, fact: str, source: Any) -> dict[str, Any]:
    """{option: value} for the options that are `auto` and have the fact: the attribute of `source` that it names."""
    facts = facts_of(type(options), fact)
    return {name: getattr(source, theirs) for name, theirs in facts.items() if getattr(options, name) == "auto"}


def check(options: Any) -> None:
    """Raise ValueError for the first option whose value does not fit its type, its range or `distinct`."""
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        if any(_fits(value, kind, field.metadata) for kind in _members(hint)):
            continue
        letters = isinstance(value, str) and any(get_origin(kind) is tuple for kind in _members(hint))
        allowed = "a tuple of names, not one text" if letters else _describe(hint, field.metadata)
        raise ValueError(f"{field.name} is {value!r}: must be {allowed}")


def parse(kind: type[T], argv: list[str], prog: str) -> T:
    """Read a command line. `--name value` flags override `--recipe FILE`, which overrides the defaults.

    Args:
      kind: flat dataclass. Its fields are str, int, float, bool, Literal, tuples of one of them, or unions of these
        with None. A tuple is read from words separated by commas or white space, unless it is `verbatim`.
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
        below = {} if recipe is None else _recipe(_read(str, recipe, "--recipe"))
        if "help" not in flags:
            return _build(kind, below | {name: (f"--{name}", value) for name, value in flags.items()})
        text = _help(kind, prog, below)
    except OSError as error:  # nothing but the recipe is opened here
        sentence = f"--recipe is {error.filename!r}: must be a file that can be read ({error.strerror})"
    except ValueError as error:
        sentence = str(error)
    else:
        print(text)
        sys.exit(0)
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def read_yaml(kind: type[T], path: str | Path) -> T:
    """Read a dataclass from a YAML file of `name: value` lines. Missing fields get their defaults.

    Raises:
      ValueError: a key is unknown or repeated, a value has a wrong type or range, or the file has another form.
      OSError: the file cannot be read.
    """
    return _build(kind, _recipe(path))


def write_yaml(options: Any, path: str | Path) -> None:
    """Write every field, so that `read_yaml` gives an equal dataclass. A crash leaves the old file or the new one."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    write_whole(Path(path), yaml.safe_dump(values, sort_keys=False))


def _flags(argv: list[str], kind: type) -> dict[str, str | list[str]]:
    """`--name a b --other=c --switch` -> {"name": ["a", "b"], "other": "c", "switch": "true"}."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in argv:
        if word == "-h" or word.startswith("--"):
            name, equals, value = ("help" if word == "-h" else word[2:]).partition("=")
            values = flags[name.replace("-", "_")] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word!r} comes before the first option: write --name value; see --help")
        else:
            values.append(word)
    hints = get_type_hints(kind)
    bare = {name: "true" for name, texts in flags.items() if not texts and hints.get(name) is bool}
    return {name: texts[0] if len(texts) == 1 else texts for name, texts in flags.items()} | bare


def _recipe(path: str | Path) -> dict[str, tuple[str, Any]]:
    """Read a YAML file as {field: (its place, for messages; text or list of texts)}. Scalars stay as written."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines")
    keys = [key.value for key, _ in node.value] if content else []
    if len(keys) > len(content):
        raise ValueError(f"{max(keys, key=keys.count)} stands more than once in {path}")
    return {name: (f"{name} in {path}", value) for name, value in content.items()}


def _build(kind: type[T], raw: dict[str, tuple[str, Any]]) -> T:
    """Make the dataclass from {field: (its place, for messages; text or list of texts)}."""
    hints, read = get_type_hints(kind), {}
    for name, (where, _) in raw.items():
        if name not in hints:
            now = [f"; it is now {new}" for new, old in facts_of(kind, "was").items() if old == name]
            hint = "".join(now) or did_you_mean(name, [*hints, "recipe"]) or "; see --help"
            raise ValueError(f"{where} is not an option{hint}")
    for field in dataclasses.fields(kind):
        if field.name in raw:
            where, value = raw[field.name]
            read[field.name] = _read(hints[field.name], value, where, field.metadata)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"--{field.name} is missing; see --help")
    return kind(**read)


def _help(kind: type, prog: str, below: dict[str, tuple[str, Any]]) -> str:
    """Every field with its docstring, what it must be, and its default (or the recipe's value)."""
    fields, hints, docs = dataclasses.fields(kind), get_type_hints(kind), _docs(kind)
    defaults = {field.name: field.default for field in fields}
    with suppress(ValueError):  # a required field is missing: show the fields' own defaults
        defaults = vars(_build(kind, below))
    lines = [f"usage: {'python -m ' * prog.startswith('grpo.')}{prog} --name value ...\n", inspect.getdoc(kind)]
    for field in fields:
        default = defaults[field.name]
        if field.default == "auto" and field.name not in below:
            default = "auto"  # the defaults above have what it means for one data set
        shown = "none, required" if default is dataclasses.MISSING else default
        lines.append(f"\n--{field.name} {_describe(hints[field.name], field.metadata)}")
        lines.append(textwrap.indent(textwrap.fill(f"{docs.get(field.name, '')} (default: {shown})", 110), "    "))
    return "\n".join(lines)


def _docs(kind: type) -> dict[str, str]:
    """{field: the docstring below it}, read from the source."""
    docs = {}
    for place in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(place))).body
        for line, below in itertools.pairwise(definition.body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[line.target.id] = " ".join(below.value.value.split())
    return docs


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None first, or `str` would accept its text; another type is its only member."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(sorted(members, key=lambda kind: kind is not NoneType))


def _read(hint: Any, value: Any, where: str, facts: Mapping[str, Any] = {}) -> Any:
    """Convert a text, or a list of texts, to the type `hint`. A ValueError names `where` and what is allowed."""
    if facts.get("verbatim"):
        return tuple([value] if isinstance(value, str) else value)
    for kind in _members(hint):
        try:
            return _read_as(kind, value)
        except (ValueError, KeyError, AttributeError):
            continue
    raise ValueError(f"{where} is {value or 'empty'!r}: must be {_describe(hint, facts)}")


_BOOL = {"true": True, "false": False}
_NULL = dict.fromkeys(("None", "none", "null", "~", ""))
_NO_TEXT = ("None", "null", "~", "")  # these mean None. `none` is missing: some tables have an entry of this name
_FLOAT = {".inf": "inf", "-.inf": "-inf"}  # how YAML writes it -> how Python reads it


def _read_as(kind: Any, value: Any) -> Any:
    """Convert to one member of a union. A value that does not fit raises ValueError, KeyError or AttributeError."""
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_read_as(get_args(kind)[0], word) for item in items for word in item.replace(",", " ").split())
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[value.strip()]
    if kind is bool:
        return _BOOL[value.lower()]
    if kind is NoneType:
        return _NULL[value.strip()]
    if kind is float:
        return float(_FLOAT.get(value.lower(), value))
    if kind is str and value.strip() in _NO_TEXT:
        raise ValueError("a text is needed here")
    return kind(value.strip())


_NUMBERS = {int: Integral, float: Real}
_SIGNS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def _fits(value: Any, kind: Any, facts: Mapping[str, Any]) -> bool:
    """Whether a value is of a type, in its range and, if it has to be, distinct."""
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple | list) or not all(_fits(item, get_args(kind)[0], facts) for item in value):
            return False
        return not facts.get("distinct") or 0 < len(set(value)) == len(value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in _NUMBERS:
        number = isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
        return number and all(_holds(value, part) for part in facts.get("allowed", "").split(" and ") if part)
    return isinstance(value, kind)


def _holds(value: Real, part: str) -> bool:
    """Whether one part of a range holds, such as `finite` or `< 2**63`. For a NaN none does."""
    if part == "finite":
        return math.isfinite(value)
    sign, bound = part.split()
    base, _, power = bound.partition("**")
    return _SIGNS[sign](value, float(base) ** int(power or 1))


def _describe(hint: Any, facts: Mapping[str, Any]) -> str:
    """What values are allowed, in words."""
    allowed, words = facts.get("allowed", ""), []
    for kind in _members(hint):
        if get_origin(kind) is Literal:
            choices = ", ".join(map(str, get_args(kind)))
            words.append(f"one of {choices}" if "," in choices else choices)
        elif get_origin(kind) is tuple:
            several = ", one or more, none twice" if facts.get("distinct") else ""
            words.append(f"a list, each item {_describe(get_args(kind)[0], facts)}{several}")
        elif kind is float:
            words.append(allowed or "a number")
        elif kind is int:
            words.append(f"a whole number {allowed}".rstrip())
        else:
            words.append({bool: "True or False", str: "a text", NoneType: "None"}[kind])
    return " or ".join(words)
