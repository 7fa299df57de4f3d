"""Token ids of prompts and candidates, truncation, and verbalizers that cannot be told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import byte_tokenizer, word_tokenizer
from zo_lightning.data import DataError, encode_prompts


def test_golden_ids(words):
    # Ids from 4 on, in the order of conftest.WORDS: a 4, film 5, with 6, no 7, plot 8, It 9, was 10, terrible 11, ...
    (encoded,) = encode_prompts(words, ["a film with no plot It was"], [[" terrible", " great"]], 2048)
    assert encoded.prompt_ids == [2, 4, 5, 6, 7, 8, 9, 10]
    assert encoded.candidate_ids == [[11], [12]]
    assert encoded.dropped == 0


def test_golden_ids_of_ragged_candidates(words):
    (encoded,) = encode_prompts(words, ["Suppose we infer?\n"], [["Yes", "No", "Maybe not sure"]], 2048)
    assert encoded.prompt_ids == [2, 21, 22, 23, 24, 28]
    assert encoded.candidate_ids == [[16], [17], [18, 19, 20]]


def test_truncation_is_from_the_left_and_keeps_bos_and_end(words):
    text = "one two " * 50 + "It was"
    whole, cut = (encode_prompts(words, [text], [[" terrible", " not sure"]], n)[0] for n in (2048, 16))
    assert whole.dropped == 0
    assert len(cut.prompt_ids) + 2 == 16
    assert cut.prompt_ids[0] == 2
    assert cut.prompt_ids[1:] == whole.prompt_ids[-13:]
    assert cut.candidate_ids == whole.candidate_ids
    assert cut.dropped == len(whole.prompt_ids) - len(cut.prompt_ids)


def test_the_tokenizer_limit_caps_max_length():
    tokenizer = word_tokenizer(model_max_length=10)
    (encoded,) = encode_prompts(tokenizer, ["one " * 50], [[" bad", " good"]], 2048)
    assert len(encoded.prompt_ids) == 9


def test_a_prompt_may_shrink_to_its_bos(words):
    (encoded,) = encode_prompts(words, ["one two"], [[" bad", " good"]], 2)
    assert encoded.prompt_ids == [2]


def test_no_room_for_the_candidate(words):
    with pytest.raises(DataError, match=r"prompt 0: nothing is left before the candidates .* limit is 2 .*max_length"):
        encode_prompts(words, ["one two"], [[" bad", " not sure"]], 2)


def test_long_candidates_are_not_told_in_whole(words):
    with pytest.raises(DataError, match=r"before the candidates \[' one one .*one one', ' bad'\] of up to 300 tokens") as told:
        encode_prompts(words, ["one two"], [[" one" * 300, " bad"]], 50)
    assert len(str(told.value)) < 300


def without_special_tokens():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = without_special_tokens()
    (encoded,) = encode_prompts(tokenizer, ["one two"], [[" bad", " good"]], 2)
    assert encoded.prompt_ids == [30]
    with pytest.raises(DataError, match=r"the prompt has no token before the candidates .*, and the tokenizer puts no BOS"):
        encode_prompts(tokenizer, [""], [[" bad", " good"]], 2048)


def test_no_trailing_eos():
    tokenizer = word_tokenizer().backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert wrapped("one bad")["input_ids"][-1] == 2
    (encoded,) = encode_prompts(wrapped, ["one"], [[" bad", " good"]], 2048)
    assert (encoded.prompt_ids, encoded.candidate_ids) == ([0, 29], [[14], [13]])


def test_a_boundary_that_is_not_stable(bpe):
    # "Answer: " ends in a token for the space, "Answer: good" has one for " good": the prompt ends at the colon.
    alone, whole = (bpe(text)["input_ids"] for text in ("Answer: ", "Answer: good"))
    assert alone != whole[: len(alone)], "the fixture does not show the case"
    (encoded,) = encode_prompts(bpe, ["Answer: "], [["good", "bad"]], 2048)
    assert encoded.prompt_ids == bpe("Answer:")["input_ids"]
    assert bpe.decode(encoded.candidate_ids[0]) == " good"
    assert bpe.decode(encoded.candidate_ids[1]) == " bad"


BPE = byte_tokenizer()


@settings(max_examples=60)
@given(
    prompt=st.text(st.sampled_from("goodb aIt:\n."), max_size=30),
    candidates=st.lists(st.text(st.sampled_from("goodba \n"), min_size=1, max_size=6), min_size=2, max_size=4),
    room=st.integers(0, 40),
)
def test_property_nothing_is_lost(prompt, candidates, room):
    if len(set(candidates)) < len(candidates):
        with pytest.raises(DataError, match="same tokens"):
            encode_prompts(BPE, [prompt], [candidates], 2048)
        return
    (whole,) = encode_prompts(BPE, [prompt], [candidates], 2048)
    max_length = 1 + max(map(len, whole.candidate_ids)) + room
    (encoded,) = encode_prompts(BPE, [prompt], [candidates], max_length)
    assert encoded.candidate_ids == whole.candidate_ids
    assert encoded.prompt_ids[0] == 2
    for candidate, ids in zip(candidates, encoded.candidate_ids, strict=True):
        assert ids
        full = BPE(prompt + candidate)["input_ids"]
        assert encoded.prompt_ids[1:] + ids == full[1 + encoded.dropped :]
        assert len(encoded.prompt_ids) + len(ids) <= max_length
    if encoded.dropped:
        assert len(encoded.prompt_ids) + max(map(len, encoded.candidate_ids)) == max_length


def test_verbalizers_without_tokens_or_with_the_same(words):
    with pytest.raises(DataError, match=r"row 3: the candidate ' ' has no tokens after the prompt"):
        encode_prompts(words, ["one"], [[" ", " good"]], 2048, lambda position: "row 3")
    with pytest.raises(DataError, match=r"the candidates ' good' and 'good ' have the same tokens \[13\], change one"):
        encode_prompts(words, ["one:"], [[" good", " bad", "good "]], 2048)
