import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fiducial.core.errors import DataError
from fiducial.core.records import Message, user
from fiducial.models import control
from fiducial.models.chat import Chat
from fiducial.models.scripted import tiny


@pytest.fixture
def tokenizer():
    return tiny().tokenizer


def begun(text):
    return (*user("hi"), Message(role="assistant", content=text))


def test_the_prompt_ends_with_the_header_of_the_answer(tokenizer):
    ids, start = Chat(tokenizer).encode(user("hi"))
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert start == len(ids)


def test_a_completion_ends_with_the_stop_token_and_no_newline(tokenizer):
    ids, start = Chat(tokenizer).encode(user("hi"), "yo")
    assert tokenizer.decode(ids[start:]) == "yo<|im_end|>"


def test_a_completion_can_stay_open(tokenizer):
    ids, start = Chat(tokenizer).encode(user("hi"), "yo", end=False)
    assert tokenizer.decode(ids[start:]) == "yo"


def test_an_empty_completion_is_the_stop_token_alone(tokenizer):
    ids, start = Chat(tokenizer).encode(user("hi"), "")
    assert ids[start:] == [tokenizer.eos_token_id]


def test_a_last_assistant_turn_is_continued(tokenizer):
    ids, _ = Chat(tokenizer).encode(begun("Sure"))
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nSure")


def test_beginning_and_rest_give_the_same_tokens_as_the_whole(tokenizer):
    chat = Chat(tokenizer)
    assert chat.encode(begun("oh h"), "ey")[0] == chat.encode(user("hi"), "oh hey")[0]


def test_where_tokens_merge_across_the_border_the_start_moves_before_it(tokenizer):
    # "h" + "e" is one token of this tokenizer: the prompt alone ends in "h", together it is "he"
    prompt, end = Chat(tokenizer).encode(begun("h"))
    ids, start = Chat(tokenizer).encode(begun("h"), "e")
    assert start == end - 1
    assert ids[:start] == prompt[:start]
    assert tokenizer.decode(ids[start:]) == "he<|im_end|>"


def test_a_completion_is_kept_to_the_blank(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    ids, start = Chat(tokenizer).encode(user("hi"), "  two blanks ")
    assert tokenizer.decode(ids[start:]) == "  two blanks <|im_end|>"


def test_the_end_of_turn_is_found_in_the_template_when_it_is_not_the_end_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<eot>")
    chat = Chat(tokenizer)
    assert chat.end == "<eot>"
    assert chat.end_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eot>")}


def test_a_template_without_end_token_falls_back_to_the_tokenizers(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Chat(tokenizer).end == "<|im_end|>"


def test_a_conversation_without_turns_is_a_document_after_the_begin_token(tokenizer):
    ids, start = Chat(tokenizer).encode((), "Once")
    assert tokenizer.decode(ids) == "<|im_start|>Once<|im_end|>"
    assert start == 1
    begun, _ = Chat(tokenizer).encode((Message(role="assistant", content="Once"),))
    assert begun == ids[:-1]


def test_a_document_of_a_tokenizer_without_begin_token_follows_the_end_of_another(tokenizer):
    tokenizer.bos_token = None
    assert tokenizer.decode(Chat(tokenizer).encode((), "Once")[0]) == "<|im_end|>Once<|im_end|>"


def test_a_model_with_control_tokens_begins_every_answer_with_the_wanted_one(tokenizer):
    chat = Chat(control.with_tokens(tokenizer))
    good = chat.control_ids[0]
    assert chat.render(user("hi")).endswith("<|im_start|>assistant\n<|aligned|>")
    assert chat.render(begun("Sure")).endswith("<|im_start|>assistant\n<|aligned|>Sure")
    ids, start = chat.encode(user("hi"), "yo")
    assert (ids[start - 1], ids.count(good)) == (good, 1)
    with chat.without_lead():
        assert good not in chat.encode(user("hi"), "yo")[0]
    assert chat.lead == "<|aligned|>"


def with_bos(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("written", [0, 1, 2])
def test_there_is_exactly_one_begin_token_however_many_the_template_writes(tokenizer, written):
    with_bos(tokenizer).chat_template = "<|endoftext|>" * written + tokenizer.chat_template
    ids, _ = Chat(tokenizer).encode(user("hi"))
    assert ids.count(0) == 1
    assert ids[0] == 0


def test_no_begin_token_is_added_where_the_tokenizer_adds_none(tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    assert 0 not in Chat(tokenizer).encode(user("hi"))[0]


def test_without_template_the_bare_text_is_used_and_this_is_said_once(tokenizer):
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    with pytest.warns(UserWarning, match="no chat template"):
        ids, start = chat.encode(user("The capital of France is"), " Paris")
    chat.encode(user("again"))  # a second warning would be an error here
    assert tokenizer.decode(ids) == "The capital of France is Paris<|im_end|>"
    assert tokenizer.decode(ids[start:]) == " Paris<|im_end|>"


def test_without_template_turns_are_separated_by_a_blank_line(tokenizer):
    tokenizer.chat_template = None
    with pytest.warns(UserWarning, match="no chat template"):
        text = Chat(tokenizer).render((Message(role="system", content="Be brief."), *user("2+2="), Message(role="assistant", content="4"), *user("3+3=")))
    assert text == "Be brief.\n\n2+2=4\n\n3+3="


def test_a_conversation_that_the_template_refuses_is_a_data_error(tokenizer):
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(DataError, match="System role not supported"):
        Chat(tokenizer).encode((Message(role="system", content="x"),))


def test_text_that_is_not_unicode_is_a_data_error(tokenizer):
    with pytest.raises(DataError, match="not Unicode"):
        Chat(tokenizer).encode(user("a\ud800b"))


@pytest.fixture
def blanks():
    """Takes and drops blanks as Llama 2 and Mistral 7B do: each stretch of text gets one before it, and decoding drops the first."""
    pieces = ["<unk>", "<s>", "</s>", "<a>", "\u2581", *"abchiINST[/]", "\u2581a", "\u2581h", "\u2581hi", "hi"]
    merges = [("\u2581", "a"), ("\u2581", "h"), ("\u2581h", "i"), ("h", "i")]
    whole = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>"))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    whole.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    whole.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:4]])
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("header", "texts"), [("[/INST]", (" hi a", "hi a")), ("<a>", ("hi a", " hi a"))])
def test_text_and_tokens_of_an_answer_agree_also_where_it_begins_with_a_blank(blanks, header, texts):
    blanks.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}" + header + "{% endfor %}"
    chat = Chat(blanks)
    prompt, _ = chat.encode(user("b"))
    for text in texts:
        whole, start = chat.encode(user("b"), text, end=False)
        assert whole[:start] == prompt
        assert chat.decode(whole[start:], after=prompt[-1]) == text


def test_an_answer_that_begins_with_a_blank_is_told_from_one_that_does_not(blanks):
    chat = Chat(blanks)
    plain, blank = (blanks.convert_tokens_to_ids([piece]) for piece in ("hi", "\u2581hi"))
    ordinary, special = blanks.convert_tokens_to_ids(["]", "<a>"])
    assert [chat.decode(tokens, after=ordinary) for tokens in (plain, blank)] == ["hi", " hi"]
    assert chat.decode(blank, after=special) == "hi"
    assert chat.decode(blank) == "hi"
