"""Learning a vocabulary: any language, the same again, mistakes that say what works."""

import json
import random
import re
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer

from fluxclip.text import tokenizer
from fluxclip.text.tokenizer import EncoderSize, fold

# captions of the same six pictures in five scripts
CAPTIONS = [
    "grinning face with big eyes", "red heart", "dog face", "snow-capped mountain",
    "woman dancing", "birthday cake with candles",
    "широко улыбается с большими глазами", "красное сердце", "морда собаки",
    "гора со снежной вершиной", "женщина танцует", "торт со свечами на день рождения",
    "大きな目の笑顔", "赤いハート", "イヌの顔", "雪山", "踊る女性", "誕生日のケーキ",
    "बड़ी आँखों वाला मुस्कुराता चेहरा", "लाल दिल", "कुत्ते का चेहरा", "बर्फ़ से ढका पहाड़",
    "नाचती हुई महिला", "मोमबत्तियों वाला जन्मदिन का केक",
    "وجه مبتسم بعيون كبيرة", "قلب أحمر", "وجه كلب", "جبل مغطى بالثلج", "امرأة ترقص",
    "كعكة عيد ميلاد بشموع",
]  # fmt: skip
UNSEEN = ["κόκκινη καρδιά", "หัวใจสีแดง", "წითელი გული", "빨간 하트", "🐶❤️", "𓀀𓀁"]
UNKNOWN = 1


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.train(CAPTIONS, pieces=700))


def test_captions_of_all_scripts_come_back_whole(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    for caption in CAPTIONS:
        ids = pieces.encode(fold(caption))
        assert UNKNOWN not in ids
        assert pieces.decode(ids) == fold(caption)
        assert fold(caption) == unicodedata.normalize("NFKC", caption)  # these have no capitals
        # learned, not spelled in bytes
        assert len(ids) < len(caption.encode()) / 1.5
    assert pieces.get_piece_size() == 700


@pytest.mark.parametrize("text", UNSEEN)
def test_scripts_never_seen_are_spelled_in_bytes(
    pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = pieces.encode(fold(text))
    assert UNKNOWN not in ids
    assert pieces.decode(ids) == fold(text)
    assert sum(map(pieces.is_byte, ids)) > len(text)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("  RED\tHeart \n", "red heart"),
        ("ｒｅｄ\u3000ｈｅａｒｔ", "red heart"),
        ("Cafe\u0301", "café"),
        ("ﬁrst ½", "first 1⁄2"),
        ("ΣΑΣ", "σασ"),
        ("a\u2581\u2581b", "a b"),
        (" \t", ""),
    ],
)
def test_case_width_and_white_space_make_no_difference(text: str, folded: str) -> None:
    assert fold(text) == folded
    assert fold(folded) == folded


def test_real_captions_come_back_and_get_short(emoji: Path) -> None:
    records = json.loads((emoji / "train.json").read_text())
    captions = [caption for record in records for caption in record["caption"]]
    model = tokenizer.train(captions, pieces=1500)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    for caption in captions:
        assert pieces.decode(pieces.encode(fold(caption))) == fold(caption)
    num_pieces = sum(len(pieces.encode(fold(caption))) for caption in captions)
    assert num_pieces < sum(map(len, captions)) / 2.5


def test_the_same_captions_give_the_same_bytes() -> None:
    assert tokenizer.train(CAPTIONS, pieces=700) == tokenizer.train(CAPTIONS, pieces=700)


def test_a_caption_longer_than_sentencepiece_takes_is_learned_from_too() -> None:
    model = tokenizer.train(["zebra crossing " * 20_000], pieces=400)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(pieces.encode("zebra crossing")) < 8


def test_the_tokenizer_file_gives_the_same_ids(emoji: Path) -> None:
    """On every caption, on what a file could take for markup, on any character, on nonsense."""
    records = json.loads((emoji / "all.json").read_text())
    captions = [caption for record in records for caption in record["caption"]]
    model = tokenizer.train([*captions, *CAPTIONS], pieces=2000)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    # of a version of Unicode whose forms all libraries know; of newer ones, some lack a few
    unicode_3_2 = [
        char
        for char in map(chr, range(sys.maxunicode))
        if unicodedata.ucd_3_2_0.category(char) not in ("Cs", "Cn", "Co")
    ]
    draw = random.Random(0)
    texts = [
        *captions, *CAPTIONS, *UNSEEN,
        "", " ", "\u2581", "\u2581\u2581 a", "</s>", "<pad> a", "<unk>", "<0x41>", "a\0b", "&amp;",
        *("a B".join(unicode_3_2[i : i + 40]) for i in range(0, len(unicode_3_2), 40)),
        *("".join(draw.choices(unicode_3_2, k=9)) for _ in range(1000)),
        *("".join(draw.choices("aeios tnrlfc-',A", k=25)) for _ in range(1000)),
        *("".join(draw.choices("ab ", k=25)) for _ in range(200)),
    ]  # fmt: skip
    end = pieces.eos_id()
    file = Tokenizer.from_str(tokenizer.to_json(model, max_tokens=10_000))
    file.no_padding()
    wrong = [
        (text, encoding.ids)
        for text, encoding in zip(texts, file.encode_batch(texts), strict=True)
        if encoding.ids != [*pieces.encode(fold(text)), end]
    ]
    assert wrong == []


def test_other_sentencepiece_models_have_no_tokenizer_file(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(tmp_path / "other"), vocab_size=200,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="did not make has no tokenizer.json"):
        tokenizer.to_json((tmp_path / "other.model").read_bytes(), max_tokens=8)


@pytest.mark.parametrize(
    ("captions", "asked", "message"),
    [
        (CAPTIONS, 8000, r"too few captions \(30\) for a vocabulary of 8000 pieces: (\d+) works"),
        (CAPTIONS, 300, r"300 pieces is too small for the characters .*: (\d+) works"),
        (["one"], 8000, r"too few captions \(1\) for a vocabulary of 8000 pieces: (\d+) works"),
    ],
)
def test_a_vocabulary_that_does_not_fit_names_one_that_does(
    captions: list[str], asked: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.train(captions, pieces=asked)
    assert "\n" not in str(error.value)
    named = re.search(message, str(error.value))
    assert named is not None
    tokenizer.train(captions, pieces=int(named[1]))
    # SentencePiece's own log would go there
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("captions", [[], ["", " \n"]])
def test_no_captions(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="learned from captions, and there is none"):
        tokenizer.train(captions)


def test_a_folder_comes_back_and_is_never_written_over(tmp_path: Path) -> None:
    size = EncoderSize(width=32, depth=1, heads=2)
    tokenizer.write(tmp_path / "new" / "en", b"vocabulary", size)
    assert tokenizer.read(tmp_path / "new" / "en") == (b"vocabulary", size)
    with pytest.raises(FileExistsError, match="already exists"):
        tokenizer.write(tmp_path / "new" / "en", b"other", size)
    assert tokenizer.read(tmp_path / "new" / "en") == (b"vocabulary", size)
