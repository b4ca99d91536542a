import io
import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from w2s_jax.errors import InputError
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary

TEXTS = [
    " leading  text\nAnd émigré end",
    "the quick brown fox",
    "  two",
    "tab\there",
    "日本語 😀",
    "",
    " ",
    "a  b   c ",
    "Hello, world!\n\n  x",
]
CORPUS = ["the quick brown fox jumps over the lazy dog, again and again  and again"] * 20


def write_config(folder, **options):
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def spm_bytes():
    """A small SentencePiece BPE model with byte fallback and Llama's way with spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def test_tokenizer_json_is_obeyed_whatever_class_the_config_names(tmp_path, byte_level):
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("Ġ"), normalizers.Replace(" ", "Ġ")]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, tokenizer_class="LlamaTokenizer", eos_token="<|endoftext|>")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(" the quick") == tokenizer.encode(" the quick").ids
    assert loaded.encode(" the quick") != loaded.encode("the quick")
    assert loaded.eos_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_a_chat_template_and_added_tokens_come_along(tmp_path, byte_level):
    byte_level.save(str(tmp_path / "tokenizer.json"))
    write_config(
        tmp_path,
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
    )
    loaded = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "<user>hi"
    assert loaded.pad_token_id == byte_level.get_vocab_size()


@pytest.mark.parametrize("options", [None, {}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_vocab_and_merges_files(tmp_path, byte_level, options):
    byte_level.model.save(str(tmp_path))
    if options is not None:
        write_config(tmp_path, **options)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == byte_level.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.get_vocab() == byte_level.get_vocab()


def assert_as_sentencepiece(loaded, reference):
    for text in TEXTS:
        ids = reference.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == ids, text
        assert loaded.decode(ids) == reference.decode(ids)


def test_sentencepiece_ids_are_sentencepieces_own(tmp_path, spm_bytes):
    (tmp_path / "tokenizer.model").write_bytes(spm_bytes)
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm_bytes)
    loaded = load_tokenizer(tmp_path)
    assert_as_sentencepiece(loaded, reference)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert loaded.encode("the") == [loaded.bos_token_id, *reference.encode("the")]


def test_options_of_a_sentencepiece_directory(tmp_path, spm_bytes):
    (tmp_path / "tokenizer.model").write_bytes(spm_bytes)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 320}))
    write_config(
        tmp_path,
        add_bos_token=False,
        add_eos_token=True,
        pad_token={"content": "<pad>"},
        chat_template="{{ messages[0]['content'] }}!",
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the")[-1] == loaded.eos_token_id
    assert loaded.encode("the")[0] != loaded.bos_token_id
    assert loaded.pad_token_id == 320
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "hi!"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    assert load_tokenizer(tmp_path).apply_chat_template(messages, tokenize=False) == "hi?"


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "mistral/tokenizer.model.v1"])
def test_real_sentencepiece_files(shared_data, tmp_path, name):
    file = shared_data / "tokenizers" / name
    if not file.is_file():
        pytest.skip(f"no {file}")
    shutil.copy(file, tmp_path / "tokenizer.model")
    loaded = load_tokenizer(tmp_path)
    assert_as_sentencepiece(loaded, sentencepiece.SentencePieceProcessor(str(file)))
    loaded.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert same_vocabulary(loaded, again)
    for text in TEXTS:
        assert again.encode(text) == loaded.encode(text)


def test_vocabularies_are_compared_by_token_not_by_size(tmp_path, byte_level):
    def variant(name, change):
        content = json.loads(byte_level.to_str())
        change(content["model"]["vocab"])
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path / name)

    def swap(vocab):
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def extend(count):
        return lambda vocab: vocab.update({f"extra{i}": len(vocab) + i for i in range(count)})

    plain, same, swapped = variant("1", dict), variant("2", dict), variant("3", swap)
    longer, far_longer = variant("4", extend(2)), variant("5", extend(300))
    assert len(plain) == len(swapped)
    assert same_vocabulary(plain, same)
    assert not same_vocabulary(plain, swapped)
    assert same_vocabulary(plain, longer)
    assert same_vocabulary(longer, plain)
    assert not same_vocabulary(plain, far_longer)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, "no tokenizer; it takes tokenizer.json, vocab.json with merges.txt"),
        (write("tokenizer.json", b"{"), "the tokenizer cannot be read"),
        (write("tokenizer.json", b"{}"), "the tokenizer cannot be read"),
        (write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
        (write("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer"),
        (write("chat_template.jinja", POINTER), "chat_template.jinja is a Git LFS pointer"),
        (write("tokenizer.model", b"IQ== 0\nIg== 1\n"), "is not a SentencePiece BPE model"),
        (write("tokenizer.model", b"\xff" * 40), "is not a SentencePiece BPE model"),
        (write("tokenizer_config.json", b"no json"), "the tokenizer cannot be read"),
    ],
)
def test_a_directory_without_a_sound_tokenizer_is_refused_in_one_line(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_empty_vocabulary_is_refused(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer's vocabulary is empty"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "/no/such/place: no such directory"),
        ("nobody/nothing", "as a Hugging Face id it is neither cached nor reachable"),
        (__file__, "is a file; give the directory that holds the tokenizer"),
    ],
)
def test_a_place_without_a_tokenizer_is_refused_in_one_line(name, message):
    with pytest.raises(InputError) as error:
        load_tokenizer(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_transformers_is_imported_on_the_first_load_only(run_python):
    code = "import sys, w2s_jax.text.tokenizer; print('transformers' in sys.modules)"
    assert run_python(code).strip() == "False"
