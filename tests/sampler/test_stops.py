"""Stop strings: which tokens are looked at, and where a text is cut. How they end a row is in test_sampler.py."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo.sampler.stops import StopStrings
from tests.fakes.models import byte_tokenizer
from tests.sampler.test_generate import WORDS


def test_stop_strings_look_only_at_tokens_that_may_complete_one():
    tokenizer = byte_tokenizer(WORDS)
    stops = StopStrings(tokenizer, ("Question:", "STOP"))
    marked = {tokenizer.decode([i]) for i in stops.may_complete.nonzero().flatten().tolist()}
    assert marked == {":", "P", "tion: Tom", "TOPy"}
    assert not StopStrings(tokenizer, ()).may_complete.any()
    assert StopStrings(tokenizer, ("a", "é")).may_complete.all()


def test_c16_white_space_that_a_token_shows_only_in_company_is_looked_at():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁end": 1, "<eos>": 2}, unk_token="<eos>"))
    backend.decoder = decoders.Metaspace()
    stops = StopStrings(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), ["a "])
    assert stops.text([1]) == "end" and stops.text([0, 1]) == "a end"
    assert stops.may_complete[1] and stops.cut([0, 1]) == ""


def test_the_first_match_cuts_wherever_its_tokens_begin():
    tokenizer = byte_tokenizer()
    stops, ids = StopStrings(tokenizer, ("zz", "\n\nQ")), tokenizer.encode("a b\n\nQ zz", add_special_tokens=False)
    assert len(ids) == 9
    assert stops.cut(ids) == "a b" and stops.cut(ids[:5]) == "a b\n\n"
    assert [stops.tokens_to_stop(ids[:n]) for n in (5, 6, 9)] == [None, 6, 6]


def test_an_empty_string_is_refused():
    with pytest.raises(ValueError, match="stop: .* holds an empty string"):
        StopStrings(byte_tokenizer(), ["x", ""])
