"""The console command as a user types it: what works, and what mistakes answer."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from fluxclip import cli, load_model
from fluxclip.cli.search import _where
from fluxclip.text.encoder import load_encoder
from retrieval import Collection, Query

ROOT = Path(__file__).resolve().parents[1]


def fluxclip(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What the console script does, in this process: torch is imported once for all tests.

    The installed command itself is run by test_readme.py.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["fluxclip", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = int(stop.value.code or 0)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line that a mistake answers, with exit code 2 and no traceback."""
    done = fluxclip(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fluxclip: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    """A folder of six clips and a still."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted((emoji / "clips").iterdir())[:6]:
        shutil.copy(path, folder)
    shutil.copy(emoji / "stills" / "00a9-fe0f.webp", folder)
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    folder = tmp_path_factory.mktemp("collections") / "few"
    assert fluxclip("index", "create", folder, "--model", "emoji-tiny").returncode == 0
    done = fluxclip("index", "add", folder, few, "--meta", "camera=north", "--json")
    assert done.returncode == 0, done.stderr
    report = {"added": 7, "skipped": 0, "moved": {}, "missing": [], "failed": {}, "segments": 7}
    assert json.loads(done.stdout) == report
    return folder


@pytest.fixture
def own_collection(collection: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(collection, tmp_path / "own"))


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from fluxclip import cli\n"
        "for arguments in (['--help'], ['train', '--help'], ['--version']):\n"
        "    sys.argv = ['fluxclip', *arguments]\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main()\n"
        "heavy = {'torch', 'faiss', 'transformers', 'av', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Train video-text models" in done.stdout


def test_search_by_text_video_and_picture(collection: Path, few: Path) -> None:
    done = fluxclip("search", collection, "a cyclone", "-k", 3, "--json")
    assert done.returncode == 0, done.stderr
    hits = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(hits) == 3
    assert set(hits[0]) == {"id", "video", "start_s", "end_s", "score", "metadata"}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert hits[0]["metadata"] == {"camera": "north"}
    for option, name in (("--video", sorted(few.glob("*.mp4"))[2].name),
                         ("--image", "00a9-fe0f.webp")):  # fmt: skip
        done = fluxclip("search", collection, option, few / name, "-k", 1)
        assert done.stdout.rstrip().endswith(name)
        assert " 1.000 " in done.stdout


def test_more_hits_than_there_are_is_said(collection: Path) -> None:
    done = fluxclip("search", collection, "anything", "-k", 100, "--json")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 7
    assert "note: 7 hits" in done.stderr


def found(*arguments: object) -> list[dict[str, object]]:
    done = fluxclip("search", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_plus_and_minus_are_a_mix(collection: Path, few: Path) -> None:
    clip = sorted(few.glob("*.mp4"))[2]
    asked = ("--video", clip, "--plus", "at night", "--minus", "people", "--minus", "a dog")
    mix = [
        Query(video=clip), Query("at night"), Query("people", weight=-0.5),
        Query("a dog", weight=-0.5),
    ]  # fmt: skip
    with Collection.open(collection) as opened:
        hits = [hit.to_dict() for hit in opened.search(mix=mix, k=5)]
    assert found(collection, *asked, "-k", 5) == hits
    plain = found(collection, "a dog", "--plus", "a cat", "-k", 5)
    assert plain == found(collection, "--plus", "a cat", "--plus", "a dog", "-k", 5)
    budget = found(collection, "--video", clip, "--token-budget", 9, "-k", 1)
    assert budget[0]["score"] < 1 - 1e-4
    assert "search takes one query" in refused("search", collection, "--minus", "a dog")
    assert "token_budget is about" in refused("search", collection, "a dog", "--token-budget", 9)


def test_a_file_of_queries(collection: Path, tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text("a cyclone\n\n  the moon \n", encoding="utf-8")
    lines = found(collection, "--queries", file, "-k", 2)
    assert [line.pop("query") for line in lines] == ["a cyclone"] * 2 + ["the moon"] * 2
    alone = found(collection, "a cyclone", "-k", 2) + found(collection, "the moon", "-k", 2)
    scores = [line.pop("score") for line in lines]  # embedded together: up to rounding
    assert scores == pytest.approx([line.pop("score") for line in alone], abs=1e-6)
    assert lines == alone
    done = fluxclip("search", collection, "--queries", file, "-k", 1)
    assert re.fullmatch(r"a cyclone:\n  1 .*\nthe moon:\n  1 .*\n", done.stdout)
    budget = ("--token-budget", 9)
    assert "token_budget is about" in refused("search", collection, "--queries", file, *budget)
    file.write_text("\n")
    assert "no query in" in refused("search", collection, "--queries", file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused("search", collection, "--queries", file)
    assert "queries.gone" in refused("search", collection, "--queries", tmp_path / "queries.gone")
    assert "takes the place of" in refused("search", collection, "a dog", "--queries", file)


def test_conditions_thresholds_and_pages(
    tmp_path: Path, collection: Path, own_collection: Path, few: Path
) -> None:
    with Collection.open(own_collection) as opened:
        for i, clip in enumerate(sorted(few.glob("*.mp4"))):
            opened.add(clip, metadata={"year": 2018 + i, "part": "ab"[i % 2]})
    every = found(own_collection, "a cyclone", "-k", 7)

    def kept(*conditions: str) -> list[int]:
        given = [part for condition in conditions for part in ("--where", condition)]
        return [hit["metadata"].get("year") for hit in found(own_collection, "a cyclone", *given)]

    years = [hit["metadata"].get("year", 0) for hit in every]
    assert kept("year>=2020", "year < 2022") == [year for year in years if 2020 <= year < 2022]
    assert kept("year in 2018, 2023,x") == [year for year in years if year in (2018, 2023)]
    assert kept("year exists", "part=b") == [year for year in years if year and year % 2]
    assert kept("camera=south") == []
    top, rest = every[:3], every[3:]
    assert found(own_collection, "a cyclone", "--offset", 3, "-k", 4) == rest
    assert found(own_collection, "a cyclone", "--min-score", top[-1]["score"]) == top
    done = fluxclip("search", own_collection, "a cyclone", "--offset", 3, "-k", 9)
    assert done.stdout.startswith("  4 ") and "note: 4 hits that match; 9 were" in done.stderr
    for wrong, said in (
        ("camera", "--where takes key=value"), (" =3", "a metadata key must be text"),
        ("year>true", "where 'year': bounds are numbers"),
    ):  # fmt: skip
        assert said in refused("search", own_collection, "a cat", "--where", wrong)
    twice = ("--where", "year>2019", "--where", "year>2020")
    assert "bounds 'year' twice" in refused("search", own_collection, "a cat", *twice)
    assert "names 'a' twice" in refused(
        "search", own_collection, "a cat", "--where", "a=1", "--where", "a>1"
    )


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("year>=2020", {"year": {"gte": 2020}}),
        ("speaker exists", {"speaker": {"exists": True}}),
        ("speaker  not exists", {"speaker": {"exists": False}}),
        ('sign="=2020"', {"sign": "=2020"}),
        ('"note" = <b', None),
        ("year!=2020", None),
        ("year==2020", None),
        ("year=>2020", None),
        ("year<>2020", None),
        ("speaker not in a,b", None),
    ],
)
def test_conditions_that_are_about_no_key_or_value_are_refused(
    given: str, where: dict[str, object] | None
) -> None:
    if where is not None:
        assert _where([given]) == where
        return
    with pytest.raises(ValueError, match="in, exists and not exists, got"):
        _where([given])


def test_merged_moments(tmp_path: Path, assets: Path) -> None:
    film = tmp_path / "film"
    done = fluxclip("index", "create", film, "--model", "emoji-tiny", "--window-s", 4)
    assert done.returncode == 0, done.stderr
    assert fluxclip("index", "add", film, assets / "film" / "film_720p.mp4").returncode == 0
    single = found(film, "a rabbit", "-k", 100)
    assert len(single) == 6
    [whole] = found(film, "a rabbit", "--merge", 0)
    assert (whole["start_s"], whole["end_s"]) == (0, max(hit["end_s"] for hit in single))
    assert (whole["id"], whole["score"]) == (single[0]["id"], single[0]["score"])
    [best] = found(film, "a rabbit", "--merge", 0, "-k", 1)  # of the best windows only
    assert best["end_s"] - best["start_s"] < whole["end_s"]
    assert found(film, "a rabbit", "--merge", 0, "--min-score", single[0]["score"]) == single[:1]
    assert "ask for more with k" in refused("search", film, "a", "--merge", 0, "--offset", 5)


def test_a_table_clips_and_thumbnails_of_the_hits(
    own_collection: Path, few: Path, tmp_path: Path
) -> None:
    query = (own_collection, "a cyclone", "-k", 3)
    hits = found(*query)
    printed = fluxclip("search", *query, "--csv", "-").stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [int(row["id"]) for row in rows] == [hit["id"] for hit in hits]
    assert [json.loads(row["metadata"]) for row in rows] == [hit["metadata"] for hit in hits]
    done = fluxclip(
        "search", *query, "--csv", tmp_path / "hits.csv", "--save-clips", tmp_path / "clips",
        "--thumbnails", tmp_path / "pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hits.csv").read_bytes().decode() == printed.replace("\r\n", "\n").replace(
        "\n", "\r\n"
    )
    assert len(list((tmp_path / "clips").iterdir())) == 3
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 3
    assert done.stdout == fluxclip("search", *query).stdout
    assert "--csv - and --json both print" in refused("search", *query, "--csv", "-", "--json")

    moved = tmp_path / "moved"
    shutil.copytree(few, moved)
    assert fluxclip("index", "add", own_collection, moved).returncode == 0
    shutil.rmtree(moved)
    done = fluxclip("search", own_collection, "a cyclone", "-k", 99, "--thumbnails", tmp_path / "t")
    assert done.returncode == 2
    assert sum(line.startswith("fluxclip: not saved: ") for line in done.stderr.splitlines()) == 7
    assert len(list((tmp_path / "t").iterdir())) == 7


def test_info_check_and_rebuild(own_collection: Path) -> None:
    info = json.loads(fluxclip("index", "info", own_collection, "--json").stdout)
    assert info["segments"] == 7
    assert info["model_name"] == "emoji-tiny"
    assert info["text_encoder"]["weights"] == "int8"
    assert info["text_encoder"]["lowest_cosine"] > 0.99
    shown = fluxclip("index", "info", own_collection).stdout
    assert f"lowest_cosine {info['text_encoder']['lowest_cosine']}, mean_cosine" in shown
    assert fluxclip("index", "check", own_collection).stdout.rstrip().endswith("is sound")
    (own_collection / "index.faiss").write_bytes(b"junk")
    assert "fixed: " in fluxclip("index", "check", own_collection).stdout
    assert "Flat index of 7 segments" in fluxclip("index", "rebuild", own_collection).stdout


def test_export_writes_the_text_tower_of_a_model(
    own_collection: Path, tmp_path: Path, emoji: Path
) -> None:
    before = fluxclip("search", own_collection, "a cyclone", "--json").stdout
    shutil.rmtree(own_collection / "text_encoder")
    command = ("export", "emoji-tiny", own_collection / "text_encoder")
    done = fluxclip(*command, "--captions", emoji / "val.json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    captions = [text for record in json.loads((emoji / "val.json").read_text())
                for text in record["caption"]]  # fmt: skip
    info = json.loads(fluxclip("index", "info", own_collection, "--json").stdout)
    assert info["text_encoder"]["captions"] > len(captions)
    assert f"{info['text_encoder']['captions']} captions" in done.stdout
    assert fluxclip("search", own_collection, "a cyclone", "--json").stdout == before
    assert "exists already" in refused(*command)
    gone = tmp_path / "gone.json"
    assert "gone.json" in refused("export", "emoji-tiny", tmp_path / "x", "--captions", gone)


def test_adding_again_adds_nothing_and_removing_is_exact(own_collection: Path, few: Path) -> None:
    (own_collection / "index.faiss").write_bytes(b"damaged")
    done = fluxclip("index", "add", own_collection, few, "--json")
    assert "making an index Flat of " in done.stderr and "takes about " in done.stderr
    again = json.loads(done.stdout)
    nothing: dict[str, object] = {"moved": {}, "missing": [], "failed": {}}
    assert again == {"added": 0, "skipped": 7, "segments": 7, **nothing}
    one = sorted(few.glob("*.mp4"))[0]
    assert fluxclip("index", "remove", own_collection, one).returncode == 0
    assert "holds no video" in refused("index", "remove", own_collection, one)
    done = fluxclip("search", own_collection, "anything", "-k", 100, "--json")
    assert one.name not in done.stdout
    ids = [json.loads(line)["id"] for line in done.stdout.splitlines()][:2]
    done = fluxclip("index", "remove", own_collection, "--id", ids[0], "--id", ids[1])
    assert done.stdout == f"{own_collection}: 2 segments removed; 4 segments now\n"
    assert "takes paths of videos, or --id" in refused("index", "remove", own_collection)


def test_moved_and_gone_files_are_said_and_a_backup_is_a_collection(
    own_collection: Path, few: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(few, folder)
    first, second, *_ = sorted(folder.glob("*.mp4"))
    assert fluxclip("index", "add", own_collection, folder).returncode == 0
    first.rename(folder / "new name.mp4")
    second.unlink()
    done = fluxclip("index", "add", own_collection, folder)
    assert f"moved: {first} -> {folder / 'new name.mp4'}" in done.stderr
    assert f"its file is gone: {second}" in done.stderr and "--prune removes" in done.stderr
    assert "14 segments now" in done.stdout
    again = fluxclip("index", "add", own_collection, folder, "--prune", "--json")
    counts = json.loads(again.stdout)
    assert (counts["missing"], counts["moved"], counts["segments"]) == ([str(second)], {}, 13)

    copy = tmp_path / "copy"
    done = fluxclip("index", "backup", own_collection, copy)
    assert done.stdout == f"{copy}: a copy of 13 segments\n"
    asked = ("a cyclone", "-k", 20, "--json")
    assert (
        fluxclip("search", copy, *asked).stdout == fluxclip("search", own_collection, *asked).stdout
    )
    assert "exists already" in refused("index", "backup", own_collection, copy)


def test_bad_videos_named_are_exit_2_and_the_good_ones_stay(
    own_collection: Path, few: Path, tmp_path: Path, emoji: Path
) -> None:
    bad = broken_videos(tmp_path, few)
    good = sorted((emoji / "clips").iterdir())[10]
    done = fluxclip("index", "add", own_collection, *bad, tmp_path / "gone.mp4", good)
    assert done.returncode == 2
    assert "1 added, 0 skipped, 4 failed" in done.stdout
    for path in (*bad, tmp_path / "gone.mp4"):
        line = next(line for line in done.stderr.splitlines() if path.name in line)
        assert line.startswith("fluxclip: not added: ")
    assert json.loads(fluxclip("index", "info", own_collection, "--json").stdout)["segments"] == 8


def test_bad_videos_in_a_folder_are_listed_and_exit_0(
    own_collection: Path, few: Path, tmp_path: Path, emoji: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    bad = broken_videos(folder, few)
    shutil.copy(sorted((emoji / "clips").iterdir())[11], folder)
    done = fluxclip("index", "add", own_collection, folder)
    assert done.returncode == 0
    assert "1 added, 0 skipped, 3 failed" in done.stdout
    assert all(path.name in done.stderr for path in bad)


def broken_videos(folder: Path, few: Path) -> list[Path]:
    """A text file, nothing at all, and half a video, each called .mp4."""
    text, empty, half = (folder / f"{name}.mp4" for name in ("text", "empty", "half"))
    text.write_text("this is no video\n" * 100)
    empty.touch()
    whole = sorted(few.glob("*.mp4"))[0].read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    return [text, empty, half]


def test_embed_writes_unit_vectors(few: Path, tmp_path: Path) -> None:
    files = sorted(few.glob("*.mp4"))
    out = tmp_path / "new" / "vectors.npz"
    done = fluxclip("embed", *files, "--model", "emoji-tiny", "--output", out,
                    "--token-budget", 64)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        assert arrays["files"].tolist() == [str(path) for path in files]
        np.testing.assert_allclose(np.linalg.norm(arrays["vectors"], axis=1), 1, atol=1e-5)
    assert "must end in .npz" in refused(
        "embed", files[0], "--model", "emoji-tiny", "--output", tmp_path / "x.npy"
    )


def test_eval_writes_record_table_and_plot(emoji: Path, tmp_path: Path) -> None:
    records = json.loads((emoji / "val.json").read_text())[:12]
    for record in records:
        record["video"] = str(emoji / record["video"])
    data = tmp_path / "twelve.json"
    data.write_text(json.dumps(records))
    done = fluxclip("eval", "--model", "emoji-tiny", "--annotations", data, "--budgets", "all,32",
                    "--output", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [result["token_budget"] for result in record["results"]] == [None, 32]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    cosine, dual = done.stdout.index("cosine"), done.stdout.lower().index("dual softmax")
    assert cosine < dual
    record_file = tmp_path / "out" / "record.json"
    report = fluxclip("eval", "report", record_file, "--output", tmp_path / "plots")
    assert report.returncode == 0, report.stderr
    assert "twelve.json@" in report.stdout and " dual " in report.stdout
    for name in ("tokens.png", "time.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_grids_are_chosen_by_validation_loss_and_used(emoji: Path, tmp_path: Path) -> None:
    shipped = emoji.parent / "models" / "emoji-tiny"
    folder = shutil.copytree(shipped, tmp_path / "run" / "best")
    config = json.loads((folder / "config.json").read_text())
    config["grids"]["rows"] = [[144, 4, 84], [18, 1, 28]]  # four tokens: anything else is better
    (folder / "config.json").write_text(json.dumps(config))
    records = json.loads((emoji / "val.json").read_text())[:6]
    for record in records:
        record["video"] = str(emoji / record["video"])
    data = tmp_path / "six.json"
    data.write_text(json.dumps(records))
    command = ("grids", tmp_path / "run", "--annotations", data, "--budgets", "18",
               "--frames", "2,4,2", "--sides", "84,84,14")  # fmt: skip
    copied = fluxclip(*command, "--output", tmp_path / "copy")
    assert copied.returncode == 0, copied.stderr
    assert json.loads((folder / "config.json").read_text()) == config
    changed = json.loads((tmp_path / "copy" / "config.json").read_text())
    [other, row] = changed["grids"]["rows"]
    assert other == [144, 4, 84] and row in ([18, 2, 84], [18, 4, 84])
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json", "model.safetensors", "README.md", "token_optimization.json"
    }  # fmt: skip
    assert copied.stdout.count(" 18 ") == 3 and copied.stdout.count("*") == 1

    done = fluxclip(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "config.json").read_text())["grids"] == changed["grids"]
    trials = json.loads((folder / "token_optimization.json").read_text())
    assert list(trials["files"]) == ["six.json"] and len(trials["trials"]) == 3
    model, clips = load_model(tmp_path / "run"), [record["video"] for record in records]
    grid = (row[1], row[2])
    assert model.grid(18) == grid
    np.testing.assert_array_equal(
        model.embed_video(clips, token_budget=18),
        model.embed_video(clips, token_budget=18, grid=grid),
    )
    assert not np.allclose(
        model.embed_video(clips, token_budget=18),
        model.embed_video(clips, token_budget=18, grid=(1, 28)),
    )


def test_mistakes_about_grids_and_the_hub(emoji: Path, tmp_path: Path) -> None:
    val = emoji / "val.json"

    def of(*more: object, model: object = "emoji-tiny", data: Path = val) -> str:
        output = () if "--output" in more else ("--output", tmp_path / "copy")
        return refused("grids", model, "--annotations", data, *output, *more)

    assert "--budgets takes token counts of 1 or more, got '0'" in of("--budgets", "36,0")
    assert "--budgets takes token counts of 1 or more, got 'all'" in of("--budgets", "all,36")
    assert "no grid of frames [1, 8, 1] and sides [28, 112, 14] has 9999 tokens" in of(
        "--budgets", 9999
    )
    small = ("--budgets", 36, "--frames", "1,1,1", "--sides", "14,14,14")
    assert "no grid of frames [1, 1, 1] and sides [14, 14, 14] has 36 tokens" in of(*small)
    assert "--frames takes first,last,stride" in of("--budgets", 36, "--frames", "2,4")
    assert "sides must be multiples of the patch" in of("--budgets", 36, "--sides", "50,90,20")
    assert "exists already" in of("--budgets", 36, "--output", tmp_path)
    assert "unknown model 'emoji-huge'" in of("--budgets", 36, model="emoji-huge")
    assert "not a model folder" in of("--budgets", 36, model="open_clip:ViT-B-32/x")
    bare = tmp_path / "bare.json"
    bare.write_text('[{"video": "a.mp4"}]')
    assert "record 1 of 1" in of("--budgets", 36, data=bare)
    in_place = ("--annotations", val, "--budgets", "36")
    for model in ("emoji-tiny", emoji.parent / "models" / "emoji-tiny"):
        assert "write a copy with --output" in refused("grids", model, *in_place)
    assert not (tmp_path / "copy").exists()
    assert "unknown model 'emoji-huge'" in refused("push", "emoji-huge", "a/b")
    assert "'emoji' is no name on the hub: org/name" in refused("push", "emoji-tiny", "emoji")


def test_convert_makes_a_folder_of_open_clip_s_weights(few: Path, tmp_path: Path) -> None:
    import open_clip
    import torch

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    images = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    config = tmp_path / "convert-from-cli.json"
    config.write_text(json.dumps({"embed_dim": 24, "vision_cfg": images, "text_cfg": text}))
    open_clip.add_model_config(config)
    weights, folder = tmp_path / "weights.pt", tmp_path / "converted"
    torch.save(open_clip.create_model(config.stem).state_dict(), weights)
    source = f"{config.stem}/{weights}"
    done = fluxclip("convert", "open-clip", source, "--frames", 4, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert f"model folder: {folder}" in done.stdout
    assert "open_clip convert-from-cli: " in done.stdout
    clip = next(iter(sorted(few.glob("*.mp4"))))
    for budget in (None, 7):
        budgets = () if budget is None else ("--token-budget", budget)
        vectors = tmp_path / f"{budget}.npz"
        done = fluxclip("embed", clip, "--model", folder, "--output", vectors, *budgets)
        assert done.returncode == 0, done.stderr
        assert np.load(vectors)["vectors"].shape == (1, 24)
    assert "exists already" in refused("convert", "open-clip", source, "--output", folder)


def test_mistakes_about_published_weights(tmp_path: Path) -> None:
    def of(*arguments: object) -> str:
        line = refused("convert", *arguments, "--output", tmp_path / "made")
        assert not (tmp_path / "made").exists()
        return line

    overlay = tmp_path / "pytorch_model.bin"
    overlay.write_bytes(b"no checkpoint")
    assert "--base and --text missing" in of("internvideo2-clip", "--overlay", overlay)
    assert "--base and --text and --overlay missing" in of("internvideo2-clip")
    assert "would run code when loaded, or is damaged" in of("fluxvit", overlay)
    assert "no such weights file" in of("fluxvit", tmp_path / "absent.pth")
    assert "none for 512" in of("fluxvit", overlay, "--projector", 512)
    assert "names no weights" in of("open-clip", "ViT-B-16")
    assert "unknown open_clip model 'ViT-Z'" in of("open-clip", "ViT-Z/openai")


def test_eval_names_the_class_of_clips(few: Path, tmp_path: Path) -> None:
    clips = sorted(few.glob("*.mp4"))[:2]
    for clip, name in zip(clips, ("v_JumpRope_g01_c01", "v_PlayingDaf_g01_c01"), strict=True):
        (tmp_path / f"{name}.avi").symlink_to(clip)
    (tmp_path / "classInd.txt").write_text("1 JumpRope\n2 PlayingDaf\n")
    (tmp_path / "testlist01.txt").write_text(
        "JumpRope/v_JumpRope_g01_c01.avi\nPlayingDaf/v_PlayingDaf_g01_c01.avi\n"
    )
    done = fluxclip("eval", "--model", "emoji-tiny", "--protocol", "ucf101", "--annotations",
                    tmp_path, "--videos", tmp_path, "--output", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "UCF101 split 1 (2 of 3783 videos)" in done.stdout and "top-5" in done.stdout
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["num_classes"] == 2 and len(record["results"][0]["ranks"]) == 2
    assert "record of a classification" in refused(
        "eval", "report", tmp_path / "out" / "record.json"
    )


def test_mistakes_about_protocols(tmp_path: Path, emoji: Path) -> None:
    def of(protocol: str, *more: object) -> str:
        return refused("eval", "--model", "emoji-tiny", "--protocol", protocol, *more)

    assert "unknown protocol 'msrvt'" in of("msrvt", "--annotations", tmp_path)
    assert "has no MSRVTT_JSFUSION_test.csv" in of("msrvtt", "--annotations", tmp_path)
    assert "no choice of language" in of("msrvtt", "--annotations", tmp_path, "--language", "en")
    assert "Missing option '--annotations'" in of("vatex")
    csv = tmp_path / "MSRVTT_JSFUSION_test.csv"
    csv.write_text("key,vid_key,video_id,sentence\nret0,msr1,video1,a cat\n")
    assert "--videos" in of("msrvtt", "--annotations", csv)
    none = of("msrvtt", "--annotations", csv, "--videos", emoji / "clips")
    assert "none of the 1 videos" in none and "video1.mp4" in none
    record = tmp_path / "record.json"
    record.write_text("{}")
    assert "is not an evaluation record" in refused("eval", "report", record)


def test_doctor_says_what_is_there() -> None:
    found = json.loads(fluxclip("doctor", "--json").stdout)
    assert found["faiss"].startswith("faiss-")
    assert "pyav" in found["video decoder"]
    assert "emoji-tiny" in found["shipped models"]
    assert found["gpu"]
    assert found["onnxruntime"][0].isdecimal() and found["tokenizers"][0].isdecimal()
    assert str(Path.home()) not in str(found) and str(ROOT) not in str(found)


def test_tokenizer_train_learns_from_annotations_and_lines(emoji: Path, tmp_path: Path) -> None:
    lines = tmp_path / "ru.txt"
    lines.write_text("улыбающаяся собака\n\nкрасное сердце\n", encoding="utf-8")
    output = tmp_path / "tokenizers" / "two"
    sources = (emoji / "val.json", lines)
    done = fluxclip("tokenizer", "train", *sources, "--output", output, "--vocabulary", 600,
                    "--width", 64, "--depth", 2, "--heads", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    count = sum(len(record["caption"]) for record in json.loads(sources[0].read_text())) + 2
    assert done.stdout == f"{output}: 600 pieces learned from {count} captions\n"
    assert done.stderr == ""
    encoder = load_encoder("sentencepiece_transformer", str(output), max_tokens=24)
    assert encoder.width == 64
    assert encoder.are_cut(["красное сердце"]) == [False]
    assert "two already exists" in refused("tokenizer", "train", lines, "--output", output)


def test_mistakes_about_tokenizers(emoji: Path, tmp_path: Path) -> None:
    def train(source: Path, *options: object) -> str:
        message = refused("tokenizer", "train", source, "--output", tmp_path / "new", *options)
        assert not (tmp_path / "new").exists()
        return message

    captions = emoji / "val.json"
    assert re.search(r"too few captions \(100\) for .* 8000 pieces: \d+ works", train(captions))
    assert "width 10 must be divisible by heads, 4" in train(captions, "--width", 10)
    assert "Invalid value for '--heads'" in train(captions, "--heads", 0)
    assert re.search("9 pieces is too small .*: 3[0-9]+ works", train(captions, "--vocabulary", 9))
    assert "none.txt" in train(tmp_path / "none.txt")
    assert "annotation file" in train(tmp_path / "none.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "is not UTF-8 text with a caption on each line" in train(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").touch()
    assert "learned from captions, and there is none" in train(tmp_path / "empty.txt")


def test_mistakes_about_models(few: Path, tmp_path: Path, assets: Path) -> None:
    clip = sorted(few.glob("*.mp4"))[0]

    def embed(model: object) -> str:
        return refused("embed", clip, "--model", model, "--output", tmp_path / "v.npz")

    assert "unknown model 'emoji-huge'" in embed("emoji-huge")
    assert "emoji-tiny" in embed("emoji-huge")
    folder = shutil.copytree(assets / "models" / "emoji-tiny", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dimm": 3}))
    assert "unknown key 'dimm'; did you mean 'dim'?" in embed(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json is no JSON" in embed(folder)
    del config["dim"]
    config["video"].pop("width")
    (folder / "config.json").write_text(json.dumps(config))
    assert "missing key 'video.width'" in embed(folder)


def test_mistakes_about_collections(collection: Path, tmp_path: Path, few: Path) -> None:
    assert "exists" in refused("index", "create", collection, "--model", "emoji-tiny")
    assert "create it first" in refused("index", "info", tmp_path / "none")
    assert "not a collection" in refused("index", "info", few)
    assert "query" in refused("search", collection, "  ")
    assert "query" in refused("search", collection)
    assert "1 or more" in refused("search", collection, "a cat", "-k", 0)
    assert "key=value" in refused("search", collection, "a cat", "--where", "camera")
    assert "no such file" in refused("search", collection, "--video", tmp_path / "gone.mp4")
    assert "token budget" in refused(
        "index", "create", tmp_path / "c", "--model", "emoji-tiny", "--token-budget", 0
    )
    assert not (tmp_path / "c").exists()


def test_a_collection_of_another_model_is_refused(own_collection: Path, assets: Path) -> None:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(own_collection / "collection.sqlite")) as database, database:
        before = database.execute("SELECT value FROM settings WHERE key = 'fingerprint'").fetchone()
        changed = before[0].replace(before[0].strip('"')[:6], "0ther0")
        database.execute("UPDATE settings SET value = ? WHERE key = 'fingerprint'", (changed,))
    line = refused("search", own_collection, "a cat")
    assert "collection 'own' was built by emoji-tiny@0ther0; this model is emoji-tiny@" in line


def test_mistakes_about_recipes_and_data(tmp_path: Path, emoji: Path) -> None:
    recipe = ROOT / "configs" / "demo.toml"
    assert "no recipe" in refused("train", "gone.toml")
    wrong = refused("train", recipe, "--set", "optimizer.learning_rte=1")
    assert "unknown key 'optimizer.learning_rte'" in wrong
    assert "number" in refused("train", recipe, "--set", 'optimizer.lr="fast"')
    both = refused("train", recipe, "--profile", "--resume")
    assert "--profile writes and resumes no run" in both
    new_run = ("--set", f"output={tmp_path}/run")  # the recipe's own may hold a run already
    gone = refused("train", recipe, *new_run, "--set", f"data.0.annotations={tmp_path}/gone.json")
    assert "gone.json" in gone
    assert "not found" in refused(
        "eval", "--model", "emoji-tiny", "--annotations", tmp_path / "no.json"
    )
    (tmp_path / "bad.json").write_text("[1")
    assert "is not JSON" in refused(
        "eval", "--model", "emoji-tiny", "--annotations", tmp_path / "bad.json"
    )
    assert "--budgets takes token counts" in refused(
        "eval", "--model", "emoji-tiny", "--annotations", emoji / "val.json", "--budgets", "all,0"
    )


def test_usage_mistakes_are_one_line_too() -> None:
    assert "No such option: --bogus" in refused("train", "--bogus", "x")
    assert "Missing option" in refused("eval")
    assert "No such command" in refused("trian")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("of a library"), "internal error: RuntimeError: "),
        (OSError(5, "I/O error"), ""),
    ],
)
def test_what_breaks_while_a_file_is_read_names_the_file(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: str
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise failure

    clip = sorted(few.glob("*.mp4"))[0]
    out = tmp_path / "vectors.npz"
    monkeypatch.setattr("av.open", broken)
    line = refused("embed", clip, "--model", "emoji-tiny", "--output", out)
    assert kind in line and str(clip) in line


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "fluxclip.cli", "--debug", "train", "gone.toml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
