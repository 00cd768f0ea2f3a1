"""A tokenizer folder: a SentencePiece vocabulary, and the size of the encoder trained over it.

`sentencepiece.model` is SentencePiece's own file, `encoder.json` the size. What
`fluxclip tokenizer train` writes, and a source of the text encoder `sentencepiece_transformer`.
"""

import io
import json
import re
import string
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from fluxclip.settings import parse, settings

VOCABULARY = "sentencepiece.model"
SIZE = "encoder.json"

_UNKNOWN, _PAD, _END = "<unk>", "<pad>", "</s>"
_SPACE = "\u2581"  # what SentencePiece writes for a space
_LONGEST = 2**14  # characters that are learned from at once: SentencePiece skips what is longer


@settings
class EncoderSize:
    """Width, depth and attention heads of a transformer; a feature has its width."""

    width: PositiveInt = 256
    depth: PositiveInt = 4
    heads: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads, {self.heads}")


def fold(text: str) -> str:
    """The text as its pieces see it: NFKC, lower case, one space between words."""
    text = unicodedata.normalize("NFKC", text).replace(_SPACE, " ")
    # character by character: in a whole text the case of a Greek sigma depends on its place, which
    # the `tokenizers` library does not see
    return " ".join("".join(map(str.lower, text)).split())


def train(captions: Iterable[str], *, pieces: int = 8000) -> bytes:
    """The content of a SentencePiece model of that many pieces, learned from folded captions.

    The pieces are byte-pair encodings; the same captions give the same bytes. 256 of the pieces are
    the bytes, of which characters too rare to get a piece are made, so that nothing in any script
    is unknown. Raises ValueError naming a number that works if the captions are too few for the
    pieces, or the pieces for the captions' characters.
    """
    folded = [text for text in map(fold, captions) if text]
    texts = [text[i : i + _LONGEST] for text in folded for i in range(0, len(text), _LONGEST)]
    if not texts:
        raise ValueError("a tokenizer is learned from captions, and there is none")
    model, works = _try(texts, pieces)
    if model is not None:
        return model
    few = works < pieces
    tried = {pieces}
    # SentencePiece names the nearest number by its own estimate, which may fail in turn
    while works not in tried:
        tried.add(works)
        model, nearest = _try(texts, works)
        if model is not None:
            break
        works = nearest
    else:
        raise ValueError(f"too few captions to learn a tokenizer from: {len(folded)}")
    if few:
        raise ValueError(
            f"too few captions ({len(folded)}) for a vocabulary of {pieces} pieces: {works} works"
        )
    raise ValueError(
        f"a vocabulary of {pieces} pieces is too small for the characters in the captions and the "
        f"256 bytes: {works} works"
    )


def _try(texts: list[str], pieces: int) -> tuple[bytes | None, int]:
    """A model of so many pieces; or None, and the number that SentencePiece names instead."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            # unigram pieces must occur in two different words: a small set has too few of them
            model_type="bpe",
            vocab_size=pieces,
            # rare characters of large scripts cost a piece each and are better spelled in bytes
            character_coverage=0.9995,
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            byte_fallback=True,
            normalization_rule_name="identity",  # `fold` has done it
            pad_id=0, unk_id=1, eos_id=2, bos_id=-1,
            pad_piece=_PAD, unk_piece=_UNKNOWN, eos_piece=_END,
            max_sentence_length=4 * _LONGEST,  # bytes
            num_threads=1,  # the result must not depend on how work was shared
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        # "... Please set it to a value <= 3324.", "... smaller than required_chars. 9 vs 327. ..."
        named = re.search(r"value <= (\d+)|required_chars\. \d+ vs (\d+)", str(error))
        if named is None:
            reason = " ".join(str(error).split())
            raise ValueError(f"SentencePiece cannot learn from these captions: {reason}") from error
        return None, int(named[1] or named[2])
    return model.getvalue(), pieces


def to_json(vocabulary: bytes, *, max_tokens: int) -> str:
    """What `fold`, the pieces, `</s>` behind them, cut and padding make, as a `tokenizers` file.

    Raises ValueError for a SentencePiece model that `train` did not make.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = messages.ModelProto.FromString(vocabulary)
    is_pairs = model.trainer_spec.model_type == model.trainer_spec.BPE
    if not is_pairs or model.normalizer_spec.name != "identity":
        raise ValueError(
            "a SentencePiece model that `fluxclip tokenizer train` did not make has no "
            "tokenizer.json"
        )
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    # SentencePiece joins any two pieces that make a piece, the one with the best score first
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(score, key=lambda piece: -score[piece])
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    white = "".join(char for char in map(chr, range(sys.maxunicode)) if char.isspace())
    end = {"SpecialToken": {"id": _END, "type_id": 0}}
    values: dict[str, Any] = {
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": max_tokens, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": ids[_PAD], "pad_type_id": 0, "pad_token": _PAD,
        },
        # none: a caption that spells one out is a text like any other
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Lowercase"},
                _replace({"Regex": f"[{white}{_SPACE}]+"}, " "),
                _replace({"Regex": "^ | $"}, ""),
                {"type": "Prepend", "prepend": _SPACE},
                _replace({"String": " "}, _SPACE),
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "special_tokens": {_END: {"id": _END, "ids": [ids[_END]], "tokens": [_END]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": _UNKNOWN,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": True, "ignore_merges": False, "vocab": ids, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(values, ensure_ascii=False)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def contents(vocabulary: bytes, size: EncoderSize) -> dict[str, bytes]:
    """The files of a tokenizer folder by name."""
    text = json.dumps(asdict(size), indent=2) + "\n"
    return {VOCABULARY: vocabulary, SIZE: text.encode()}


def read(folder: str | Path) -> tuple[bytes, EncoderSize]:
    """The vocabulary and the size in a tokenizer folder.

    Raises FileNotFoundError if a file is missing, ValueError for an encoder.json of another form.
    """
    folder = Path(folder).expanduser()
    for name in (VOCABULARY, SIZE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no tokenizer folder, it has no {name}: `fluxclip tokenizer train` "
                "makes one"
            )
    path = folder / SIZE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object with width, depth and heads")
    return (folder / VOCABULARY).read_bytes(), parse(EncoderSize, values, source=str(path))


def write(folder: str | Path, vocabulary: bytes, size: EncoderSize) -> None:
    """Write a new tokenizer folder. Raises FileExistsError if there is one of that name."""
    folder = Path(folder)
    refuse_existing(folder)
    folder.mkdir(parents=True)
    for name, content in contents(vocabulary, size).items():
        (folder / name).write_bytes(content)


def refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} already exists: a tokenizer is written into a new folder")
