"""The exported text tower: what the model says about texts, said without torch."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layout_embedder import LayoutEmbedder

import fluxclip
from fluxclip import Embedder
from retrieval import Collection, export_text_encoder, query_encoder
from retrieval.query_encoder import CAPTIONS, FOLDER, QueryEncoder

# What 8-bit weights may change in a score, stated here; measured: 0.013 at most on 150 x 150.
SCORE_TOLERANCE = 0.02

ODD_TEXTS = [
    "  \t\n",
    "\x00\x07 bell",
    "zero\u200bwidth \ufeff",
    "ÀÉÎ Ñandú İstanbul ﬁn",
    "e\u0301 against \u00e9",
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "漢字かな交じり文 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "word " * 500,
    "a" * 5000,
    "，。！？「」",
]


@pytest.fixture(scope="module")
def model() -> Embedder:
    return fluxclip.load_model("emoji-tiny")


@pytest.fixture(scope="module")
def written(model: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model itself writes: both precisions and the tokenizer."""
    folder = tmp_path_factory.mktemp("written")
    model.export_text(folder)
    return folder


class Written:
    """The model, with its files written once for all tests."""

    def __init__(self, model: Embedder, folder: Path) -> None:
        self.name, self.fingerprint, self.dim = model.name, model.fingerprint, model.dim
        self.model, self.folder = model, folder

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.embed_text(texts)

    def export_text(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def source(model: Embedder, written: Path) -> Written:
    return Written(model, written)


@pytest.fixture(scope="module")
def exported(source: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "text"
    export_text_encoder(source, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(exported: Path) -> QueryEncoder:
    return QueryEncoder(exported)


@pytest.fixture(scope="module")
def test_set(emoji: Path) -> list[tuple[Path, str]]:
    records = json.loads((emoji / "test.json").read_text())
    return [(emoji / record["video"], record["caption"][0]) for record in records]


@pytest.fixture(scope="module")
def collection(
    model: Embedder, exported: Path, test_set: list[tuple[Path, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """The test clips, indexed, with the exported text tower."""
    folder = tmp_path_factory.mktemp("collections") / "emoji"
    source = LayoutEmbedder()  # made without a text tower, which takes seconds to export
    source.name, source.fingerprint, source.dim = model.name, model.fingerprint, model.dim
    Collection.create(folder, model=source).close()
    shutil.copytree(exported, folder / FOLDER)
    with Collection.open(folder, model=model) as opened:
        opened.add([video for video, _ in test_set])
    return folder


def test_int8_vectors_are_the_models_own_within_what_the_manifest_says(
    model: Embedder, encoder: QueryEncoder, exported: Path
) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "manifest.json", "text.onnx", "tokenizer.json",
    ]  # fmt: skip
    assert encoder.manifest["weights"] == "int8"
    assert encoder.manifest["captions"] == len(CAPTIONS)
    assert encoder.manifest["fingerprint"] == model.fingerprint
    assert (exported / "text.onnx").stat().st_size < 30e6  # 91 MB in fp32
    cosines = (encoder.embed_text(CAPTIONS) * model.embed_text(CAPTIONS)).sum(axis=1)
    assert encoder.manifest["lowest_cosine"] == pytest.approx(cosines.min(), abs=1e-4)
    assert encoder.manifest["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert cosines.min() > 0.99


def test_odd_texts_too_and_whatever_their_neighbours(
    model: Embedder, encoder: QueryEncoder
) -> None:
    together = encoder.embed_text(ODD_TEXTS)
    assert together.shape == (len(ODD_TEXTS), model.dim) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([encoder.embed_text([text]) for text in ODD_TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert (together * model.embed_text(ODD_TEXTS)).sum(axis=1).min() > 0.99
    assert encoder.embed_text([]).shape == (0, model.dim)


def test_texts_are_cut_into_the_same_tokens(model: Embedder, encoder: QueryEncoder) -> None:
    @settings(max_examples=150)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
    @example(ODD_TEXTS)
    @example(["x", "word " * 500])
    def check(texts: list[str]) -> None:
        ours = [encoding.ids for encoding in encoder._run._tokenizer.encode_batch(texts)]
        assert ours == model.model.tokenize(texts).tolist()

    check()


def test_fp32_where_8_bits_are_not_near_enough(
    source: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(query_encoder._LEAST_COSINE, "int8", 0.99999)
    manifest = export_text_encoder(source, tmp_path / "text", captions=["my own caption"])
    assert manifest["weights"] == "fp32" and manifest["captions"] == len(CAPTIONS) + 1
    texts = [*CAPTIONS, *ODD_TEXTS]
    vectors = QueryEncoder(tmp_path / "text").embed_text(texts)
    np.testing.assert_allclose(vectors, source.embed_text(texts), atol=1e-5)


def test_an_export_that_says_something_else_is_refused(source: Written, tmp_path: Path) -> None:
    class Other(Written):
        def embed_text(self, texts: Sequence[str]) -> np.ndarray:
            return np.roll(super().embed_text(texts), 1, axis=1)

    with pytest.raises(ValueError, match=r"differs from the model's own: cosine -?0\.\d+ for"):
        export_text_encoder(Other(source.model, source.folder), tmp_path / "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_export_that_is_cut_short_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    class Failing(LayoutEmbedder):
        def export_text(self, folder: Path) -> None:
            (folder / "fp32.onnx").write_bytes(b"half of it")
            raise failure

    with pytest.raises(type(failure)):
        export_text_encoder(Failing(), tmp_path / "text")
    with pytest.raises(type(failure)):
        Collection.create(tmp_path / "cats", model=Failing())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_before_the_model_is_loaded(exported: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        export_text_encoder("no such model", exported)


def test_create_exports_and_search_needs_no_model(
    source: Written, model: Embedder, tmp_path: Path, clips: list[Path]
) -> None:
    class Whole(Written):
        grid, embed_video, fit = model.grid, model.embed_video, model.fit
        source = model.source

    with Collection.create(tmp_path / "c", model=Whole(model, source.folder)) as made:
        made.add(clips[:3])
        info = made.info()
    assert info["text_encoder"]["weights"] == "int8"
    assert info["text_encoder"]["lowest_cosine"] > 0.99
    assert json.loads(json.dumps(info)) == info
    with Collection.open(tmp_path / "c") as opened:
        assert len(opened.search("a cyclone")) == 3
        assert not opened._serving.is_loaded
        opened.search(video=clips[0], k=1)
        assert opened._serving.is_loaded
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_model_without_an_export_is_searched_by_itself(
    cats: Collection, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    cats.add(clips[:3])
    assert cats.info()["text_encoder"] is None
    assert cats.search("moon") == cats.search(vector=embedder.embed_text(["moon"])[0])


def damage_weights(folder: Path) -> None:
    path = folder / "text.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_model(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "0ther"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_weights, "text.onnx is damaged: delete the folder, export anew"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be used"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be use"),
        (of_another_model, "was exported from another model"),
    ],
)
def test_what_is_damaged_or_of_another_model_is_not_used(
    damage: Callable[[Path], object], said: str, collection: Path, model: Embedder, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(collection, tmp_path / "copy"))
    damage(folder / FOLDER)
    with (
        caplog.at_level(logging.WARNING, "retrieval"),
        Collection.open(folder, model=model) as opened,
    ):
        hits = opened.search("a full moon", k=5)
        assert hits == opened.search(vector=model.embed_text(["a full moon"])[0], k=5)
        assert opened.info()["text_encoder"] is None
    [record] = caplog.records
    assert said in record.getMessage() and "queries by text load the model" in record.getMessage()


def test_hits_are_those_of_the_torch_path(
    collection: Path, model: Embedder, test_set: list[tuple[Path, str]]
) -> None:
    """Hits may change places only where their scores are as near as the rounding; R@10 stays."""
    same_first = 0
    found = {"onnx": 0, "torch": 0}
    with Collection.open(collection, model=model) as opened:
        vectors = model.embed_text([text for _, text in test_set])
        for (video, text), vector in zip(test_set, vectors, strict=True):
            paths = {
                "onnx": opened.search(text, k=len(opened)),
                "torch": opened.search(vector=vector, k=len(opened)),
            }
            scores = {hit.id: hit.score for hit in paths["torch"]}
            assert {hit.id for hit in paths["onnx"]} == scores.keys()
            for hit in paths["onnx"]:
                assert hit.score == pytest.approx(scores[hit.id], abs=SCORE_TOLERANCE)
            same_first += paths["onnx"][0].id == paths["torch"][0].id
            for name, hits in paths.items():
                found[name] += str(video) in [hit.video for hit in hits[:10]]
    assert same_first >= 0.9 * len(test_set)
    assert abs(found["onnx"] - found["torch"]) <= 0.01 * len(test_set)


def test_the_command_searches_without_torch_and_transformers(collection: Path) -> None:
    code = (
        "import contextlib, sys\n"
        "from fluxclip import cli\n"
        f"sys.argv = ['fluxclip', 'search', {str(collection)!r}, 'a full moon', '--json', '-k9']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main()\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'onnx', 'av', 'PIL', 'rich.console'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Collection.open(collection) as opened:
        hits = opened.search("a full moon", k=9)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        hit.to_dict() for hit in hits
    ]


def test_a_query_that_is_no_unicode_is_a_users_error(collection: Path) -> None:
    with Collection.open(collection) as opened, pytest.raises(ValueError, match="not valid Unico"):
        opened.search("caf\udce9")
