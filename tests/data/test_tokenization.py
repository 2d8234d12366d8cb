import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import ConfigError
from research.data.tokenization import (
    BytePairEncoding,
    Bytes,
    ByteTokenizer,
    TokenizerJson,
    build_tokenizer,
    tokenizer_from_json,
)

TEXTS = [
    b"def f(x):\n    if x:\n        return [x, 12345]\n\n\nclass A:\n    pass\n" * 20,
    "naïve façade, 東京 и Москва — ✓\r\n\ttabs\x0c\n".encode() * 10,
    b"the quick brown fox <|eos|> the quicker browner fox\n" * 30,
]


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(BytePairEncoding(vocab_size=320), TEXTS)


@pytest.fixture(scope="module")
def tokenizers_by_name(bpe):
    return {"bytes": build_tokenizer(Bytes()), "bpe": bpe}


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.binary(), st.text("ab 1\n\t\x00\x85\u2028é東_()", max_size=40)))
def test_any_text_and_bytes_come_back(tokenizers_by_name, name, text):
    tokenizer = tokenizers_by_name[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids >= 0).all() and (ids < tokenizer.vocab_size - 3).all()
    if isinstance(text, bytes):
        assert tokenizer.decode_bytes(ids) == text
        assert tokenizer.decode(ids) == text.decode(errors="replace")
    else:
        assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab 1\n\r\t\x00\x7f\x85\xa0\u2028é東_()'[^]\\-`~{", max_size=40)))
def test_bpe_is_what_its_tokenizer_json_says(bpe, text):
    library_tokenizer = tokenizers.Tokenizer.from_str(bpe.to_huggingface())
    library_tokenizer.encode_special_tokens = True
    assert library_tokenizer.encode(text, add_special_tokens=False).ids == bpe.encode(text).tolist()


def test_bpe_compresses_and_is_as_large_as_asked(bpe):
    assert bpe.vocab_size == 320
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_does_not_depend_on_the_order(bpe):
    assert build_tokenizer(BytePairEncoding(vocab_size=320), TEXTS[::-1]).to_json() == bpe.to_json()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_special_tokens_are_apart_and_decode_to_nothing(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    assert special == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    assert tokenizer.start_id == tokenizer.bos_id
    assert tokenizer.decode([special[0], *tokenizer.encode("a<|eos|>"), special[2]]) == "a<|eos|>"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_tokenizer_travels_as_json(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    rebuilt = tokenizer_from_json(tokenizer.to_json())
    assert rebuilt.to_json() == tokenizer.to_json() and rebuilt.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(rebuilt.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_streaming_waits_for_whole_characters():
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in "é✓".encode()] == ["", "é", "", "", "✓"]
    stream.push(0xE2)
    assert stream.finish() == "\ufffd"


def huggingface_file(folder, **files):
    """A small SentencePiece-like tokenizer with byte fallback: what it decodes depends on the neighbours."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "▁b", "c", "▁"]
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder / "tokenizer.json")


def test_huggingface_file(tmp_path):
    path = huggingface_file(tmp_path, tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": None})
    tokenizer = build_tokenizer(TokenizerJson(path, eos="</s>"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == 263
    for text in ("c c東京 c", "", "é"):
        for built in (tokenizer, tokenizer_from_json(tokenizer.to_json())):
            ids = built.encode(text)
            assert built.decode(ids) == text == built.decode_bytes(ids).decode()
            stream = built.stream()
            assert "".join(map(stream.push, ids)) + stream.finish() == text
    assert tokenizer.decode([1, *tokenizer.encode(b"c"), 2]) == "c"


def test_eos_begins_documents_where_there_is_no_bos(tmp_path):
    path = huggingface_file(tmp_path)
    assert build_tokenizer(TokenizerJson(path, eos="</s>")).start_id == 2
    with pytest.raises(ConfigError, match="neither BOS nor EOS"):
        _ = build_tokenizer(TokenizerJson(path)).start_id


def test_what_cannot_be_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer\.path is 'gone\.json': it must be"):
        build_tokenizer(TokenizerJson("gone.json"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"must be a Hugging Face tokenizer\.json"):
        build_tokenizer(TokenizerJson(str(tmp_path / "other.json")))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.eos is '<end>': it must be a token of"):
        build_tokenizer(TokenizerJson(huggingface_file(tmp_path), eos="<end>"))
    with pytest.raises(ConfigError, match="vocab_size is 200: it must be at least 259"):
        BytePairEncoding(vocab_size=200)
    with pytest.raises(ConfigError, match="needs training documents"):
        build_tokenizer(BytePairEncoding())
    with pytest.raises(ConfigError, match=r"vocab_size is 5,000, and 11 bytes of text give"):
        build_tokenizer(BytePairEncoding(vocab_size=5000), [b"hello hello"])
    for text in ("{oops", "[]", '{"kind": "Other"}', '{"kind": "BytePairTokenizer"}'):
        with pytest.raises(ConfigError):
            tokenizer_from_json(text)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_what_cannot_be_encoded_or_decoded(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode("\ud800")
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary"):
            tokenizer.decode([i])


def test_huggingface_encodes_text_only(tmp_path):
    with pytest.raises(ValueError, match="encodes UTF-8 text only"):
        build_tokenizer(TokenizerJson(huggingface_file(tmp_path))).encode(b"\xff")


def test_bytes_with_the_special_ones_among_them():
    """H-Net's: 0xFE and 0xFF, which no text in UTF-8 has."""
    tokenizer = build_tokenizer(Bytes(inside=True))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, 254, 255)
    assert tokenizer.encode_published("é").tolist() == [254, 0xC3, 0xA9]
    assert tokenizer.decode([254, 0xC3, 0xA9, 255]) == "é"
    assert tokenizer_from_json(tokenizer.to_json()).to_json() == tokenizer.to_json() != ByteTokenizer().to_json()
