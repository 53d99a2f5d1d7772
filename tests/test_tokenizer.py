"""Downloaded tokenizers: the settings in their folder are used, and no text is lost or becomes a special token."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stickjax.config import DataConfig
from stickjax.data.corpus import load_corpus, tokenize
from stickjax.data.tokenizer import StreamDecoder, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level(special=(), plain=(), pieces=()):
    """Return a byte-level BPE tokenizer like GPT-2's.

    Args:
      special: the special tokens.
      plain: added tokens that are not special.
      pieces: words that become one token by merges.
    """
    vocabulary, merges = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for piece in pieces:
        for n in range(1, len(piece)):
            merges.append((piece[:n], piece[n]))
            vocabulary.setdefault(piece[: n + 1], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def llama():
    """Return a BPE tokenizer like Llama's SentencePiece tokenizer, with a token for every byte.

    It adds a space before the text. The decoder removes this space.
    """
    pieces = [*SPECIAL, *"\u2581helowrd.", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, []
    for word in ("\u2581hello", "\u2581world"):
        for n in range(1, len(word)):
            if word[: n + 1] not in vocabulary:
                vocabulary[word[: n + 1]] = len(vocabulary)
                merges.append((word[:n], word[n]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def unigram():
    """Return a unigram tokenizer like T5's, which adds an end-of-text token to every text.

    The special tokens are also pieces of the unigram vocabulary.
    """
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|user|>", 0.0), ("\u2581hello", -2.0), ("\u2581", -3.0)]
    pieces += [(letter, -4.0) for letter in "helowrd.</s>|u"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def word_piece():
    """Return a WordPiece tokenizer like BERT's."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "wor", "##ld", ".", "[", "]", "sep"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in vocabulary[:4]])
    return tokenizer


def word_level():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """Return a function that saves a tokenizer into a folder and loads it from there.

    The function takes the tokenizer, `eot` (the end-of-text token), and the content of further JSON files by name.
    """

    def make(tokenizer, eot=None, **files):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        (tmp_path / "folder").mkdir()
        tokenizer.save(str(tmp_path / "folder/tokenizer.json"))
        for name, tree in files.items():
            (tmp_path / f"folder/{name}.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return load_tokenizer(str(tmp_path / "folder/tokenizer.json"), eot)

    return make


CHAT = byte_level(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # ids 256, 257, 258


@pytest.mark.parametrize(
    "files, eot, ends",
    [
        (dict(), None, [256]),
        (dict(), "<|im_end|>", [258]),
        (dict(generation_config={"eos_token_id": 258}, config={"model_type": "x", "eos_token_id": 256}), None, [258]),
        (dict(generation_config={"eos_token_id": [258, 256]}), None, [258, 256]),
        (dict(generation_config={"eos_token_id": [65, 258]}), None, [258, 65]),  # a letter may end the generation
        (dict(generation_config={"eos_token_id": None}, config={"model_type": "x", "eos_token_id": 258}), None, [258]),
        (dict(config={"eos_token_id": 258}), None, [256]),  # not a model's config.json
        (dict(token_ids={"eos_token_id": 258}), None, [258]),
        (dict(generation_config={"eos_token_id": -1, "pad_token_id": -1, "eos_token": ""}), None, [256]),
        (dict(tokenizer_config={"eos_token": "<|im_end|>"}), None, [258]),
        (dict(tokenizer_config={"eos_token": {"content": "<|im_end|>"}}), None, [258]),
        (dict(special_tokens_map={"eos_token": "<|im_end|>"}, tokenizer_config={"eos_token": None}), None, [258]),
        (dict(generation_config={"eos_token_id": 2}, tokenizer_config={"eos_token": "<|im_end|>"}), None, [258]),
        (dict(generation_config={"eos_token_id": 256}), "<|im_end|>", [258, 256]),
        (dict(generation_config="\ufeff" + json.dumps({"eos_token_id": 258})), None, [258]),
    ],
    ids=str,
)  # fmt: skip
def test_the_end_of_text_is_what_the_folder_says(folder, files, eot, ends):
    tokenizer = folder(CHAT, eot, **files)
    assert (tokenizer.eot, tokenizer.ends) == (ends[0], frozenset(ends))


@pytest.mark.parametrize(
    "files, eot, message",
    [
        (dict(generation_config={"eos_token_id": 2}), None, r"eos_token_id=2, which is not an added .* data\.eot"),
        (dict(tokenizer_config={"eos_token": "</s>"}), None, r"eos_token='</s>', which is not an added token"),
        (dict(generation_config={"eos_token_id": "258"}), None, r"config.json: eos_token_id='258' is not a token id"),
        (dict(generation_config={"eos_token_id": [True]}), None, "eos_token_id=True is not a token id"),
        (dict(generation_config="{"), None, "generation_config.json is not JSON"),
        (dict(special_tokens_map=[1]), None, "special_tokens_map.json must be a JSON object, not a list"),
        (dict(), "<|end|>", r"data\.eot='<\|end\|>' is not an added token .*'<\|im_end\|>'"),
    ],
    ids=str,
)
def test_what_names_no_end_of_text_is_refused(folder, files, eot, message):
    with pytest.raises(ValueError, match=message):
        folder(CHAT, eot, **files)


def test_the_end_that_the_user_names_ends_documents(folder, tmp_path):
    folder(byte_level(special=["<|im_end|>"]), "<|im_end|>")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i}<|im_end|>"}) + "\n" for i in range(6)))
    source, tokenizer = str(tmp_path / "texts.jsonl"), str(tmp_path / "folder/tokenizer.json")
    named = dict(tokenizer=tokenizer, eot="<|im_end|>")
    for corpus in load_corpus(DataConfig(source="text", path=source, heldout_every=3, **named)):
        assert (corpus.tokens == 256).sum() == corpus.documents
    meta = tokenize(source, str(tmp_path / "tokens"), **named)
    assert (meta["eot"], meta["num_tokens"]) == (256, 6 * 12)
    with pytest.raises(ValueError, match="no end of text: no file in its folder names one; set data.eot to one"):
        load_corpus(DataConfig(source="text", path=source, tokenizer=tokenizer))
    with pytest.raises(ValueError, match="eot='<|im_end|>' needs a tokenizer.json"):
        DataConfig(eot="<|im_end|>")


def test_only_an_added_token_ends_a_text(folder):
    tokenizer = folder(byte_level(special=["<|end_of_text|>"], pieces=["</s>"]))
    assert tokenizer.eot not in tokenizer.encode("<s>old</s>")
    assert tokenizer.decode([tokenizer.eot - 1, tokenizer.eot]) == "</s>"
    for name in ("<|im_end|>", "<EOS>", "[SEP]", "<\uff5cend\u2581of\u2581sentence\uff5c>"):
        with pytest.raises(ValueError, match="has no end of text"):
            folder(byte_level(special=[name]))
        assert folder(byte_level(special=[name]), name).eot == 256


SHAPES = [
    (byte_level(special=["<|endoftext|>"]), None, "<|endoftext|>", "one<|endoftext|>two"),
    (byte_level(plain=["<|endoftext|>"]), None, "<|endoftext|>", "one<|endoftext|>two"),
    (byte_level(special=["<|endoftext|>"], pieces=["<|endoftext|>"]), None, "<|endoftext|>", "one<|endoftext|>two"),
    (llama(), None, "</s>", "hello</s>world"),
    (unigram(), None, "</s>", "hello</s>"),
    (word_level(), None, "</s>", "hello </s> world"),
    (word_piece(), "[SEP]", "[SEP]", "hello [SEP] world"),
]
each_shape = pytest.mark.parametrize(
    "shape, eot, end, text", SHAPES, ids=["gpt2", "gpt2-plain", "gpt2-learnt", "llama", "t5", "words", "bert"]
)


@each_shape
def test_no_text_spells_a_special_token_and_a_prompt_does_on_request(folder, shape, eot, end, text):
    tokenizer = folder(shape, eot)
    assert tokenizer.special_id(end) == tokenizer.eot and tokenizer.special_id("hello") is None
    ids = tokenizer.encode(text)
    assert len(ids) and tokenizer.eot not in ids and tokenizer.document(text).tolist().count(tokenizer.eot) == 1
    asked = tokenizer.encode(text, special=True).tolist()
    assert asked.count(tokenizer.eot) == 1
    assert tokenizer.encode(text).tolist() == ids.tolist(), "special=True must not affect later calls"
    assert end not in tokenizer.decode(asked)
    if shape is not SHAPES[5][0] and shape is not SHAPES[6][0]:  # in these, letters are unknown words
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["hello </s>", "other"])
def test_a_text_of_unknown_words_alone_is_one_error(folder, text):
    shape = Tokenizer(models.WordLevel({"</s>": 0, "hello": 1}, unk_token="<unk>"))
    shape.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = folder(shape)
    assert tokenizer.encode("hello").tolist() == [1] and tokenizer.encode("hello </s>", special=True).tolist() == [1, 0]
    with pytest.raises(ValueError, match=f"the tokenizer cannot encode '{text}'"):
        tokenizer.encode(text)


@each_shape
def test_a_tokenizer_is_saved_and_read_with_all_that_its_folder_says(folder, tmp_path, shape, eot, end, text):
    tokenizer = folder(shape, None, config={"model_type": "x", "eos_token_id": shape.token_to_id(end)})
    (tmp_path / "new").mkdir()
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(str(tmp_path / "new/tokenizer.json"))
    assert (again.name, again.eot, again.ends, again.prefix) == (
        tokenizer.name, tokenizer.eot, tokenizer.ends, tokenizer.prefix
    )  # fmt: skip
    assert again.files == tokenizer.files


@pytest.mark.parametrize(
    "shape, eot, prefix",
    [(llama(), None, (1,)), (unigram(), None, ()), (word_piece(), "[SEP]", (2,)), (CHAT, None, ())],
)
def test_what_stands_before_a_text(folder, shape, eot, prefix):
    tokenizer = folder(shape, eot)
    assert tokenizer.prefix == prefix and tokenizer.bos == (prefix or (None,))[0]
    ids = tokenizer.encode("hello").tolist()
    assert ids == tokenizer.prompt("hello").tolist() == [*prefix, *ids[len(prefix) :]]
    assert tokenizer.document("hello").tolist() == [*ids, tokenizer.eot]
    assert ids == [i for i in shape.encode("hello").ids if i != tokenizer.eot], "ids must equal the tokenizer's"
    assert tokenizer.prompt("").tolist() == list(prefix or [tokenizer.eot])


def test_a_prompt_that_spells_its_beginning_has_one(folder):
    tokenizer = folder(llama())
    assert tokenizer.prompt("<s>hello", special=True).tolist() == tokenizer.prompt("hello").tolist()
    assert tokenizer.prompt("<|user|>hello", special=True)[:2].tolist() == [1, 3]
    assert 3 not in tokenizer.prompt("<|user|>hello")


def test_an_end_that_also_begins_a_text_stands_once_between_documents(folder):
    shape = byte_level(special=["</s>"])  # as OPT's
    shape.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 256)])
    tokenizer = folder(shape)
    assert tokenizer.prompt("a").tolist() == [256, 64] and tokenizer.bos is None
    assert tokenizer.document("a").tolist() == [64, 256]


@pytest.mark.parametrize("text", ["hello world", "hello world.", " hello", "hello  world", "h\u00e9llo 🙂 world"])
@pytest.mark.parametrize("shape", [llama(), CHAT, unigram(), word_piece()], ids=["llama", "gpt2", "t5", "bert"])
def test_a_prompt_and_what_follows_are_the_text_of_all_ids(folder, shape, text):
    tokenizer = folder(shape, "[SEP]" if shape.token_to_id("[SEP]") else None)
    ids = tokenizer.prompt(text).tolist()
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if before.endswith("\ufffd"):
            continue  # a prompt never ends inside a character
        stream = StreamDecoder(tokenizer, ids[:cut])
        assert before + "".join(map(stream.feed, ids[cut:])) + stream.flush() == tokenizer.decode(ids)
    if shape.token_to_id("<0x00>") or shape is CHAT:  # these have a token for every byte
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("entry, value", [("special_tokens", {}), ("single", [{"SpecialToken": {}}])])
def test_a_damaged_post_processor_is_one_error(folder, tmp_path, entry, value):
    folder(llama())
    path = tmp_path / "folder/tokenizer.json"
    tree = json.loads(path.read_text())
    tree["post_processor"][entry] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        load_tokenizer(str(path))


def test_a_stream_goes_on_in_a_text_that_is_not_known(folder):
    tokenizer = folder(llama())
    stream = StreamDecoder(tokenizer)
    assert stream.feed(tokenizer.encode("hello world")[2]) + stream.flush() == " world"


def test_a_special_token_in_a_stream_takes_no_space_with_it(folder):
    tokenizer = folder(llama())
    _, hello, world = tokenizer.encode("hello world").tolist()
    for prompt in ([1, hello, 3], [1, hello]):
        stream = StreamDecoder(tokenizer, prompt)
        assert [stream.feed(i) for i in (3, world, 3, 3, world)] == ["", " world", "", "", " world"]
