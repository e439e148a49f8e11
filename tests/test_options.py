"""Texts to options: flags and recipes are read alike, and every mistake is one sentence that says how to mend it."""

from dataclasses import dataclass
from typing import Literal

import pytest

from grpo.options import check, did_you_mean, facts_of, option, parse, read_yaml, write_yaml


@dataclass(frozen=True)
class Options:
    """One field of each kind."""

    path: str
    """Required."""
    name: str = "none"
    """A text, of which `none` is a value."""
    revision: str | None = "main"
    """A text or nothing."""
    steps: int = 3
    """A count."""
    rate: float = 0.5
    """A number."""
    chat: bool = True
    """A switch."""
    schedule: Literal["constant", "linear"] = "constant"
    """A choice."""
    tokens: int | Literal["auto"] = "auto"
    """A count, or auto."""
    shots: tuple[int, ...] | None = None
    """Counts, or nothing."""
    words: tuple[str, ...] = ("a", "b")
    """Texts."""


VALUES = [  # (field, text, value)
    ("steps", "7", 7),
    ("steps", "-7", -7),
    ("steps", "010", 10),
    ("rate", "1e-5", 1e-5),
    ("rate", "1", 1.0),
    ("rate", "-0.25", -0.25),
    ("rate", ".inf", float("inf")),
    ("chat", "False", False),
    ("chat", "false", False),
    ("chat", "True", True),
    ("name", "no", "no"),
    ("name", "1e-5", "1e-5"),
    ("name", "none", "none"),
    ("revision", "None", None),
    ("revision", "null", None),
    ("revision", "v1.0", "v1.0"),
    ("schedule", "linear", "linear"),
    ("tokens", "auto", "auto"),
    ("tokens", "4096", 4096),
    ("shots", "null", None),
    ("shots", "0,8", (0, 8)),
    ("shots", "8", (8,)),
    ("words", "x, y", ("x", "y")),
]


def from_flags(*argv: str) -> Options:
    return parse(Options, ["--path", "p", *argv], prog="tool")


def from_recipe(tmp_path, text: str) -> Options:
    (tmp_path / "recipe.yaml").write_text("path: p\n" + text)
    return read_yaml(Options, tmp_path / "recipe.yaml")


def sentence_of(capsys, *argv: str) -> str:
    """The error of a command line: the only output, on stderr, one line, exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        parse(Options, list(argv), prog="tool")
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith("tool: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(("field", "text", "value"), VALUES)
def test_flags_and_recipes_read_a_text_alike(tmp_path, field, text, value):
    for options in (from_flags(f"--{field}", text), from_recipe(tmp_path, f"{field}: {text}\n")):
        read = getattr(options, field)
        assert read == value and type(read) is type(value)


def test_lists_are_words_or_commas_or_yaml_lists(tmp_path):
    assert from_flags("--words", "x", "y", "--shots", "0", "2,8").shots == (0, 2, 8)
    assert from_flags("--words", "x", "y").words == ("x", "y")
    assert from_flags("--words").words == ()
    options = from_recipe(tmp_path, "words: [x, y]\nshots:\n  - 0\n  - 8\n")
    assert options == Options("p", words=("x", "y"), shots=(0, 8))


def test_ways_to_write_a_flag():
    assert from_flags("--steps=4").steps == 4
    assert from_flags("--steps", "4", "--steps", "5").steps == 5
    assert parse(Options, ["--path=a=b"], "tool").path == "a=b"


def test_a_bare_bool_is_true_and_no_other_flag_may_be_bare(capsys, tmp_path):
    @dataclass(frozen=True)
    class Switches:
        """Two bools."""

        check: bool = False
        """One."""
        quiet: bool = False
        """Another."""

    assert parse(Switches, ["--check"], "tool") == Switches(check=True)
    assert parse(Switches, ["--check", "--quiet", "False"], "tool") == Switches(check=True)
    assert parse(Switches, ["--check", "--check", "False"], "tool") == Switches()
    assert "--steps is 'empty'" in sentence_of(capsys, "--path", "p", "--steps")
    assert "--chat is 'empty'" in sentence_of(capsys, "--path", "p", "--chat=")
    with pytest.raises(ValueError, match="chat in .* is 'empty': must be True or False"):
        from_recipe(tmp_path, "chat: []\n")


def test_a_flag_beats_the_recipe_and_the_recipe_the_default(tmp_path):
    (tmp_path / "r.yaml").write_text("path: p\nsteps: 10\nrate: 2\n")
    options = parse(Options, ["--rate", "4", "--recipe", str(tmp_path / "r.yaml")], "tool")
    assert options == Options("p", steps=10, rate=4.0)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stepz", "3"], ["--stepz", "did you mean steps?"]),
        (["--qqqqqqqq", "3"], ["--qqqqqqqq", "--help"]),
        (["--steps", "1.5"], ["--steps", "'1.5'", "a whole number"]),
        (["--steps", "True"], ["--steps", "'True'", "a whole number"]),
        (["--steps", "1", "2"], ["--steps", "['1', '2']", "a whole number"]),
        (["--steps"], ["--steps", "empty", "a whole number"]),
        (["--rate", "fast"], ["--rate", "'fast'", "a number"]),
        (["--chat", "1"], ["--chat", "'1'", "True or False"]),
        (["--schedule", "lin"], ["--schedule", "'lin'", "one of constant, linear"]),
        (["--tokens", "many"], ["--tokens", "'many'", "a whole number or auto"]),
        (["--shots", "0,x"], ["--shots", "'0,x'", "None or a list, each item a whole number"]),
        (["--name", "null"], ["--name", "'null'", "a text"]),
        (["steps", "3"], ["'steps'", "--name value"]),
        (["--recipe", "missing.yaml"], ["--recipe is 'missing.yaml': must be a file", "No such file"]),
        (["--recipe", "/"], ["--recipe is '/': must be a file", "Is a directory"]),
        (["--recipe"], ["--recipe", "a text"]),
    ],
)
def test_a_mistake_in_a_flag_is_one_sentence(capsys, argv, said):
    sentence = sentence_of(capsys, *argv, "--path", "p")
    assert all(word in sentence for word in said), sentence


def test_a_missing_option_is_named(capsys):
    assert "--path is missing" in sentence_of(capsys, "--steps", "3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3", "stepz in .* not an option; did you mean steps?"),
        ("steps: 3\nsteps: 4", "steps stands more than once"),
        ("steps: true", "steps in .* 'true': must be a whole number"),
        ("steps: 3.0", "steps in .* '3.0': must be a whole number"),
        ("steps: [3]", "steps in .* must be a whole number"),
        ("steps: {a: 3}", "steps in .* must be a whole number"),
        ("shots: {a: 3}", "shots in .* must be None or a list"),
        ("words: [[x]]", "words in .* must be a list"),
        ("rate: high", "rate in .* 'high': must be a number"),
        ("steps: {a: 3", "is not YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as error:
        from_recipe(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- path\n- p\n", "just text\n", "3\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="must hold `name: value` lines"):
        read_yaml(Options, tmp_path / "recipe.yaml")


def test_what_is_written_reads_back_equal(tmp_path):
    odd = Options("a: #b", "no", None, -3, 0.1 + 0.2, False, "linear", 5, (0, 8), ("1e-5", "true"))
    for options in (odd, Options("p", rate=float("inf")), Options("~/x", rate=1e-5, revision="none-such")):
        write_yaml(options, tmp_path / "o.yaml")
        assert read_yaml(Options, tmp_path / "o.yaml") == options
    assert [path.name for path in tmp_path.iterdir()] == ["o.yaml"]


def test_help_explains_every_field_and_shows_the_recipes_default(capsys, tmp_path):
    @dataclass(frozen=True)
    class WithDefaults:
        """What it does."""

        first_field: int = 3
        """First, in seconds."""

    (tmp_path / "r.yaml").write_text("first_field: 41\n")
    for argv, default in ((["--help"], "3"), (["-h", "--recipe", str(tmp_path / "r.yaml")], "41")):
        with pytest.raises(SystemExit) as exit_:
            parse(WithDefaults, argv, prog="tool")
        shown = " ".join(capsys.readouterr().out.split())
        assert exit_.value.code == 0
        assert "What it does." in shown and "--first_field" in shown
        assert f"First, in seconds. (default: {default})" in shown


def test_help_shows_auto_as_the_default_and_not_what_it_means_for_one_data_set(capsys):
    with pytest.raises(SystemExit):
        parse(Settled, ["--help"], prog="grpo.tool")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Rewards. (default: auto)" in shown and "usage: python -m grpo.tool" in shown


def test_nearest_name():
    assert did_you_mean("learning_rat", ["seed", "learning_rate"]) == "; did you mean learning_rate?"
    assert did_you_mean("zzz", ["seed", "learning_rate"]) == ""


@dataclass(frozen=True)
class Settled:
    """An `auto` that gets a value at once."""

    rewards: str = "auto"
    """Rewards."""

    def __post_init__(self) -> None:
        vars(self).update(rewards="of one data set")


@dataclass(frozen=True)
class Verbatim:
    """Texts taken whole, and a field that happens to be called recipe."""

    stop: tuple[str, ...] = option((), verbatim=True)
    """Texts."""
    recipe: str | None = None
    """A file of something else."""

    def __post_init__(self) -> None:
        if self.recipe is None:
            raise ValueError("recipe: is needed")


def test_texts_may_be_taken_whole_and_a_field_may_be_called_recipe():
    flags = ["--stop", "\n\nQuestion:", " a, b ", "--recipe", "there.yaml"]
    assert parse(Verbatim, flags, "x") == Verbatim(("\n\nQuestion:", " a, b "), "there.yaml")
    assert parse(Verbatim, ["--recipe=r", "--stop=\n"], "x").stop == ("\n",)


def test_help_is_shown_although_the_defaults_alone_are_no_options(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Verbatim, ["--help"], "x")
    assert ended.value.code == 0 and "A file of something else" in capsys.readouterr().out


@dataclass(frozen=True)
class Limited:
    """Options whose ranges stand on their lines."""

    count: int = option(0, ">= 0 and < 2**3")
    """A range with two ends."""
    share: float | None = option(None, "> 0 and finite", known=True)
    """A number or nothing."""
    sizes: tuple[int, ...] = option((1,), ">= 1", distinct=True, known=True)
    """Numbers."""
    size: Literal["auto"] | int = option("auto", ">= 1")
    """A choice or a number."""

    def __post_init__(self) -> None:
        check(self)


GOOD = [{"count": 7}, {"share": 1}, {"share": None}, {"sizes": (2, 1)}, {"sizes": [3]}, {"size": 1}, {"size": "auto"}]
BAD = [
    ({"count": 8}, "count is 8: must be a whole number >= 0 and < 2**3"),
    ({"count": "3"}, "count is '3': must be a whole number >= 0 and < 2**3"),
    ({"count": False}, "count is False: must be a whole number >= 0 and < 2**3"),
    ({"share": 0.0}, "share is 0.0: must be None or > 0 and finite"),
    ({"share": float("inf")}, "share is inf: must be None or > 0 and finite"),
    ({"share": float("nan")}, "share is nan: must be None or > 0 and finite"),
    ({"sizes": ()}, "sizes is (): must be a list, each item a whole number >= 1, one or more, none twice"),
    ({"sizes": (1, 1)}, "none twice"),
    ({"sizes": (1, 0)}, "sizes is (1, 0): must be a list, each item a whole number >= 1"),
    ({"size": 0}, "size is 0: must be auto or a whole number >= 1"),
    ({"size": "many"}, "size is 'many': must be auto or a whole number >= 1"),
]


@pytest.mark.parametrize("values", GOOD)
def test_values_in_their_range_are_allowed(values):
    assert vars(Limited(**values)) == vars(Limited()) | values


@pytest.mark.parametrize(("values", "said"), BAD)
def test_a_value_outside_of_its_range_is_a_sentence_that_says_the_range(values, said):
    with pytest.raises(ValueError) as error:
        Limited(**values)
    assert said in str(error.value)


def test_a_text_of_the_wrong_kind_is_told_the_range_too(capsys):
    with pytest.raises(SystemExit):
        parse(Limited, ["--count", "many"], "x")
    assert capsys.readouterr().err == "x: error: --count is 'many': must be a whole number >= 0 and < 2**3\n"


def test_other_facts_are_for_those_who_ask():
    assert facts_of(Limited, "known") == {"share": True, "sizes": True} and facts_of(Limited, "unknown") == {}
