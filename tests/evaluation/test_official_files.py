"""Official files in miniature over real clips: who asks for what, what is missing, what is wrong.

`pairs` of a task, its (video id, clip that the file really is, text), is compared with what a few
plain lines read from the same files, or with what is written beside them.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from colour_embedder import ColourEmbedder

from fluxclip import plugins
from fluxclip.evaluation import protocols
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols import (
    ClassificationTask,
    RetrievalTask,
    activitynet,
    kinetics400,
    msrvtt,
    ucf101,
    vatex,
)
from fluxclip.video import probe, read_clip

Link = Callable[..., Path]

# eleven characters each: with underscores, a leading dash, and one that itself begins with "v_"
DASH, UNDER, V_UNDER, GONE = "-a_b-c_d-e_", "__12_34_56_", "v_v_9876543", "gone_-_gone"


@pytest.fixture
def link(emoji: Path, tmp_path: Path) -> Link:
    """Put a clip of the emoji set under a name into the folder of videos, which it returns."""

    def link(**names: str) -> Path:
        for clip, name in names.items():
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(emoji / "clips" / f"{clip.removeprefix('_')}.mp4")
        return tmp_path / "videos"

    return link


def pairs(task: RetrievalTask) -> list[tuple[str, str, str]]:
    """Video id, the emoji clip that its file is, and text, of each query."""
    return [
        (task.ids[i], task.videos[i].resolve().stem, text)
        for i, text in zip(task.video_of_text_M, task.texts, strict=True)
    ]


class AnyWords(ColourEmbedder):
    """Knows the colours of clips, and gives every text a direction of its own."""

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        drawn = [np.random.default_rng(zlib.crc32(t.encode())).normal(size=self.dim) for t in texts]
        vectors = np.array(drawn)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def check_numbers(task: RetrievalTask) -> None:
    """Score a task and compare every rank, R@1 and the mean and median rank with plain loops."""
    model = AnyWords()
    record = evaluate(model, task, budgets=[8])
    assert record.data.name.startswith(f"{task.protocol} (")
    assert record.data.missing == task.missing
    assert record.data.texts.num_repeated == len(task.texts) - len(set(task.texts))
    texts = model.embed_text(task.texts)
    videos = [model.embed_video([read_clip(v, num_frames=2, side=112)])[0] for v in task.videos]
    pair = set(enumerate(task.video_of_text_M.tolist()))
    asked = {
        "text_to_video": [
            [(round(float(text @ video), 6), (m, n) in pair) for n, video in enumerate(videos)]
            for m, text in enumerate(texts)
        ],
        "video_to_text": [
            [(round(float(video @ text), 6), (m, n) in pair) for m, text in enumerate(texts)]
            for n, video in enumerate(videos)
        ],
    }
    for direction, queries in asked.items():
        ranks, first = [], []
        for scores in queries:
            best = max(score for score, is_right in scores if is_right)
            better = sum(score > best for score, _ in scores)
            right, wrong = (
                sum(s == best and r is kind for s, r in scores) for kind in (True, False)
            )
            ranks.append(1 + better + wrong / (right + 1))
            first.append(0 if better else right / (right + wrong))
        score = getattr(record.results[0].cosine, direction)
        assert score.ranks == pytest.approx(ranks)
        assert score.r1 == pytest.approx(100 * np.mean(first))
        assert (score.mean_rank, score.median_rank) == pytest.approx(
            (np.mean(ranks), np.median(ranks))
        )
        assert score.num_gallery == len(queries[0])


# MSR-VTT

# Row by row what the file below says; video7020 comes twice, and two videos share a sentence.
SENTENCES = [
    ("video9770", "1f308", "a rainbow, then a star"),
    ("video7020", "1f31a", 'he says "hello"; she leaves'),
    ("video7020", "1f31a", "Ein Mädchen zählt bis zwölf"),
    ("video77", "1f31b", "a rainbow, then a star"),
    ("video8", "1f31c", "月亮在说话。"),
]


def jsfusion_csv(delimiter: str) -> str:
    rows = [
        ("key", "vid_key", "video_id", "sentence"),
        ("ret0", "msr9770", "video9770", '"a rainbow, then a star"'),
        ("ret1", "msr7020", "video7020", '"he says ""hello""; she leaves"'),
        ("ret2", "msr5", "video5", "no file for this one"),
        ("ret3", "msr77", "video77", '"a rainbow, then a star"'),
        ("ret4", "msr7020", "video7020", "Ein Mädchen zählt bis zwölf"),
        ("ret5", "msr8", "video8", "月亮在说话。"),
    ]
    return "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n"


@pytest.fixture
def msrvtt_videos(link: Link) -> Path:
    folder = link(
        _1f308="video9770.mp4", _1f31a="a/video7020.MP4", _1f31b="a/b/video77.webm",
        _1f31c="video8.mp4", _1f31d="video80.mp4", _1f31e="video8.jpg", _nothing="video5.mp4",
    )  # fmt: skip
    (folder / "a" / "b" / "up").symlink_to(folder)  # leads back
    (folder / "a").rename(folder.parent / "disk")
    (folder / "linked").symlink_to(folder.parent / "disk")
    return folder


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_msrvtt_1k_a(msrvtt_videos: Path, tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "MSRVTT_JSFUSION_test.csv"
    path.write_bytes(("\ufeff" + jsfusion_csv(delimiter)).encode())
    task = msrvtt.read(tmp_path, videos=msrvtt_videos)
    assert pairs(task) == SENTENCES
    assert (task.protocol, task.captions) == ("MSR-VTT 1k-A", "all")
    assert (task.choices, task.sources) == ({"split": "1k-A"}, [path])
    assert (task.missing, task.num_expected, task.is_complete) == (["video5"], 1000, False)
    check_numbers(task)
    assert all(probe(video).num_frames > 1 for video in task.videos)


def test_msrvtt_1k_a_is_complete_with_precisely_a_thousand_videos(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    lines = ["key,vid_key,video_id,sentence"]
    for i in range(1001):
        (videos / f"video{i}.mp4").touch()
        lines.append(f"ret{i},msr{i},video{i},number {i}")
    path = tmp_path / "test.csv"
    for num_videos in (999, 1000, 1001):
        path.write_text("\n".join(lines[: num_videos + 1]))
        task = msrvtt.read(path, videos=videos)
        assert (len(task.videos), task.is_complete) == (num_videos, num_videos == 1000)
    path.write_text("\n".join([*lines[:1001], "ret1001,msr0,video0,once more"]))
    task = msrvtt.read(path, videos=videos)
    assert (len(task.videos), len(task.texts), task.is_complete) == (1000, 1001, False)


def msrvtt_data(folder: Path) -> list[tuple[str, str, str]]:
    """MSRVTT_data.json with five videos, and its (video, split, caption)s."""
    splits = {"video77": "train", "video9770": "test", "video5": "test", "video8": "test"}
    splits["video7020"] = "validate"
    entries = []
    for number in range(4):  # captions of a video are not together in the file
        for video in splits:
            entries.append(
                {"sen_id": len(entries), "video_id": video, "caption": f"{number}, {video}"}
            )
    entries[3]["caption"] = entries[8]["caption"] = 'twice: "the same" 你好'
    content = {
        "info": {"year": "2016"},
        "videos": [{"video_id": v, "split": s, "category": 9} for v, s in splits.items()],
        "sentences": entries,
    }
    (folder / "MSRVTT_data.json").write_text(json.dumps(content), encoding="utf-8-sig")
    return [(e["video_id"], splits[e["video_id"]], e["caption"]) for e in entries]


def test_msrvtt_full(msrvtt_videos: Path, tmp_path: Path) -> None:
    captions = msrvtt_data(tmp_path)
    task = msrvtt.read(tmp_path, videos=msrvtt_videos, split="full")
    assert pairs(task) == [
        (video, clip, caption)
        for video, clip in (("video9770", "1f308"), ("video8", "1f31c"))
        for its, split, caption in captions
        if its == video and split == "test"
    ]
    assert len(task.texts) == 8 and len(set(task.texts)) == 7
    assert task.protocol == "MSR-VTT full"
    assert (task.missing, task.num_expected) == (["video5"], 2990)


def test_msrvtt_list_of_ids(msrvtt_videos: Path, tmp_path: Path) -> None:
    captions = msrvtt_data(tmp_path)
    path = tmp_path / "mine.v2.txt"
    path.write_bytes(b"\xef\xbb\xbfvideo8\r\n\r\n  video77\r\nvideo8\r\n")
    task = msrvtt.read(tmp_path, videos=msrvtt_videos, split=str(path))
    assert pairs(task) == [
        (video, clip, caption)
        for video, clip in (("video8", "1f31c"), ("video77", "1f31b"))
        for its, _, caption in captions
        if its == video
    ]
    assert (task.protocol, task.num_expected, task.is_complete) == ("MSR-VTT mine.v2", 2, True)
    assert task.sources == [tmp_path / "MSRVTT_data.json", path]


# ActivityNet Captions


def test_activitynet(link: Link, tmp_path: Path) -> None:
    videos = link(
        _1f308=f"v_{DASH}.mp4", _1f31a=f"{UNDER}.mkv", _1f31b=f"{V_UNDER}.mp4",
        _1f31c="v_9876543.mp4", _1f31d="9876543.mp4",
    )  # fmt: skip
    content = {
        f"v_{DASH}": {
            "duration": 9.5,
            "timestamps": [],
            "sentences": [" One. ", "\n", " Two, too."],
        },
        f"v_{GONE}": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Nobody sees this."]},
        f"v_{UNDER}": {"duration": 1, "timestamps": [[0, 1]], "sentences": ['Er sagt: "Grüße"']},
        f"v_{V_UNDER}": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Second half."]},
        UNDER: {"duration": 1, "timestamps": [[0, 1]], "sentences": ["一句话", "end"]},
    }
    for name in ("val_1.json", "val_2.json"):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
    paragraphs = {
        f"v_{DASH}": ("1f308", "One. Two, too."),
        f"v_{UNDER}": ("1f31a", 'Er sagt: "Grüße" 一句话 end'),
        f"v_{V_UNDER}": ("1f31b", "Second half."),
    }
    task = activitynet.read(tmp_path, videos=videos)
    assert pairs(task) == [(video, *rest) for video, rest in paragraphs.items()]
    assert (task.protocol, task.captions) == ("ActivityNet Captions val_1", "joined")
    assert (task.missing, task.num_expected) == ([f"v_{GONE}"], 4917)
    check_numbers(task)
    task = activitynet.read(tmp_path, videos=videos, split="val_2")
    assert (task.protocol, task.num_expected) == ("ActivityNet Captions val_2", 4)
    assert task.sources == [tmp_path / "val_2.json"]

    (tmp_path / "ids.txt").write_text(f"{V_UNDER}\nv_{DASH}\n{DASH}\n")
    task = activitynet.read(tmp_path, videos=videos, split=str(tmp_path / "ids.txt"))
    chosen = (f"v_{V_UNDER}", f"v_{DASH}")
    assert pairs(task) == [(video, *paragraphs[video]) for video in chosen]
    assert (task.protocol, task.is_complete) == ("ActivityNet Captions ids", True)


# VATEX


@pytest.fixture
def vatex_folder(link: Link, tmp_path: Path) -> Path:
    """Both official files: four clips, one without a file, one twice in the validation file."""
    link(
        _1f308=f"{DASH}_000002_000012.mp4", _1f31a=f"{UNDER}_7_17.mp4",
        _1f31b=f"{DASH}_000012_000022.mp4", _1f31c=f"{DASH[1:]}_000002_000012.mp4",
    )  # fmt: skip
    clips = [f"{DASH}_000002_000012", f"{GONE}_000001_000011", f"{UNDER}_000007_000017"]
    clips += [f"{DASH}_000012_000022", clips[0]]
    content = [
        {"videoID": clip, "enCap": [f'"{i}", said {k}' for k in range(2)], "chCap": [f"第{i}句；"]}
        for i, clip in enumerate(clips)
    ]
    content[2]["enCap"].append(content[0]["enCap"][0])
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(content))
    for entry in content:
        del entry["chCap"]
    (tmp_path / "vatex_public_test_english_v1.1.json").write_text(json.dumps(content[:4]))
    return tmp_path


VATEX_CLIPS = {
    f"{DASH}_000002_000012": "1f308",
    f"{UNDER}_000007_000017": "1f31a",
    f"{DASH}_000012_000022": "1f31b",
}


@pytest.mark.parametrize(
    ("split", "language", "file", "key", "num_expected"),
    [
        ("validation", "en", "vatex_validation_v1.0.json", "enCap", 3000),
        ("validation", "zh", "vatex_validation_v1.0.json", "chCap", 3000),
        ("test", "en", "vatex_public_test_english_v1.1.json", "enCap", 6000),
    ],
)
def test_vatex(
    vatex_folder: Path, split: str, language: str, file: str, key: str, num_expected: int
) -> None:
    content = json.loads((vatex_folder / file).read_text())
    task = vatex.read(vatex_folder, videos=vatex_folder, split=split, language=language)
    assert pairs(task) == [
        (video, clip, caption)
        for video, clip in VATEX_CLIPS.items()
        for entry in content
        if entry["videoID"] == video
        for caption in entry[key]
    ]
    assert task.protocol == f"VATEX {split} {language}"
    assert task.choices == {"split": split, "language": language}
    assert (task.missing, task.num_expected) == ([f"{GONE}_000001_000011"], num_expected)
    check_numbers(task)


def test_vatex_list_of_ids(vatex_folder: Path) -> None:
    path = vatex_folder / "hgr_test.txt"
    path.write_text(f"{UNDER}_000007_000017\n{DASH}_000012_000022\n")
    task = vatex.read(vatex_folder, videos=vatex_folder, split=str(path), language="zh")
    assert [(clip, text) for _, clip, text in pairs(task)] == [
        ("1f31a", "第2句；"),
        ("1f31b", "第3句；"),
    ]
    assert (task.protocol, task.is_complete) == ("VATEX hgr_test zh", True)


# classification


def test_kinetics(link: Link, tmp_path: Path) -> None:
    videos = link(
        _1f308=f"petting animal (not cat)/{DASH}_000001_000011.mp4",
        _1f31a=f"archery/{UNDER}_136_146.mp4",
        _1f31b=f"archery/{V_UNDER}_000000_000010.mp4",
    )
    (tmp_path / "validate.csv").write_bytes(
        "\ufefflabel,youtube_id,time_start,time_end,split,is_cc\r\n"
        f"petting animal (not cat),{DASH},1,11,validate,0\r\n"
        f'"archery",{UNDER},136,146,val,1\r\n'
        f"zumba,{GONE},1766,1776,val,0\r\n"
        f"yoga,{V_UNDER},0,10,train,0\r\n"
        f"archery,{UNDER},136,146,val,1\r\n".encode()
    )
    task = kinetics400.read(tmp_path, videos=videos)
    assert [
        (video, path.resolve().stem, task.classes[index])
        for video, path, index in zip(task.ids, task.videos, task.class_of_video_N, strict=True)
    ] == [
        (f"{DASH}_000001_000011", "1f308", "petting animal (not cat)"),
        (f"{UNDER}_000136_000146", "1f31a", "archery"),
    ]
    assert task.classes == ["archery", "petting animal (not cat)", "zumba"]
    assert task.class_of_video_N.dtype == np.int64
    assert (task.protocol, task.missing) == ("Kinetics-400 val", [f"{GONE}_001766_001776"])
    assert (task.num_expected, task.is_complete) == (19_906, False)


@pytest.mark.parametrize(("split", "num_expected"), [("1", 3783), ("2", 3734), ("3", 3696)])
def test_ucf101(link: Link, tmp_path: Path, split: str, num_expected: int) -> None:
    videos = link(
        _1f308="ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.mp4",
        _1f31a="HandstandPushups/v_HandStandPushups_g01_c01.avi",
        _1f31b="YoYo/v_YoYo_g01_c02.avi",
    )
    (tmp_path / "classInd.txt").write_bytes(
        b"1 ApplyEyeMakeup\r\n2 YoYo\r\n37 HandstandPushups\r\n"
    )
    (tmp_path / f"testlist0{split}.txt").write_bytes(
        b"ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n"
        b"HandStandPushups/v_HandstandPushups_g01_c01.avi\r\n"
        b"YoYo/v_YoYo_g01_c01.avi\r\n"
    )
    task = ucf101.read(tmp_path, videos=videos, split=split)
    assert task.classes == ["apply eye makeup", "yo yo", "handstand pushups"]
    assert [path.resolve().stem for path in task.videos] == ["1f308", "1f31a"]
    np.testing.assert_array_equal(task.class_of_video_N, [0, 2])
    assert task.ids == ["v_ApplyEyeMakeup_g01_c01", "v_HandstandPushups_g01_c01"]
    assert task.missing == ["v_YoYo_g01_c01"]
    assert (task.protocol, task.num_expected) == (f"UCF101 split {split}", num_expected)
    assert task.sources == [tmp_path / "classInd.txt", tmp_path / f"testlist0{split}.txt"]


# what is wrong, for every protocol


def test_every_protocol_says_where_its_files_come_from_and_takes_the_same_two_arguments(
    tmp_path: Path,
) -> None:
    for name in plugins.available("fluxclip.evaluation.protocols"):
        module = plugins.load("fluxclip.evaluation.protocols", name)
        assert module.__doc__ and module.read.__doc__
        with pytest.raises(FileNotFoundError) as caught:
            protocols.read(name, tmp_path / "nowhere", videos=tmp_path)
        assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


CSV_HEADER = "key,vid_key,video_id,sentence\n"
K400_HEADER = "label,youtube_id,time_start,time_end,split\n"
CLIP = f"{DASH}_000002_000012"

WRONG_FILES = [
    ("msrvtt", "1k-A", "key,video_id,sentences\n", "no column sentence .*wanted: MSRVTT_JSFUSION"),
    ("msrvtt", "1k-A", json.dumps([{"x": "y" * 200_000}]), "wanted: MSRVTT_JSFUSION_test.csv"),
    ("msrvtt", "1k-A", "", "no column video_id, sentence .it has: none.*wanted: MSRVTT_JSFUSION"),
    ("msrvtt", "1k-A", b"\x89PNG\xff\xfe", "not UTF-8 text; wanted: MSRVTT_JSFUSION_test.csv"),
    ("msrvtt", "1k-A", CSV_HEADER, "has no row"),
    ("msrvtt", "1k-A", CSV_HEADER + "ret0,msr1,video1,a,b\n", "line 2: 5 fields for 4 columns"),
    ("msrvtt", "1k-A", CSV_HEADER + "ret0,msr1,video1\n", "line 2: 3 fields for 4 columns"),
    ("msrvtt", "1k-A", CSV_HEADER + 'ret0,msr1,video1,"a\n' * 2, "is no csv file"),
    ("msrvtt", "1k-A", CSV_HEADER + "ret0,msr1,video1, \n", "no caption, or empty ones: video1"),
    ("msrvtt", "full", CSV_HEADER, "is not JSON .*wanted: MSRVTT_data.json"),
    ("msrvtt", "full", '[{"video": "a.mp4", "caption": "b"}]', "form; wanted: MSRVTT_data.json"),
    ("msrvtt", "full", '{"videos": [], "sentences": []}', 'no video whose "split" is "test"'),
    ("msrvtt", "full", {"videos": [{"video_id": "video1", "split": "test"}], "sentences": []},
     "no caption, or empty ones: video1"),
    ("msrvtt", "1kA", "", "unknown split '1kA': expected 1k-A, full or the path of an id list"),
    ("activitynet", "val_1", CSV_HEADER, "is not JSON .*wanted: val_1.json"),
    ("activitynet", "val_2", "[]", "another form; wanted: val_2.json"),
    ("activitynet", "val_1", "{}", "names no video"),
    ("activitynet", "val_1", '{"v_1": {"sentences": ["a"]}}', "'v_1' is no v_ and YouTube id"),
    ("activitynet", "val_1", {f"v_{DASH}": {"sentences": "a"}}, "are not a list of texts"),
    ("activitynet", "val_1", {f"v_{DASH}": {"sentences": [" ", ""]}}, f"ones: v_{DASH}"),
    ("activitynet", "val_1", '{"v": {"sentences": []}, "v": {"sentences": []}}', "key 'v' twice"),
    ("vatex", "validation", {"videos": []}, "form; wanted: vatex_validation_v1.0.json"),
    ("vatex", "test", [{"videoID": CLIP}], "form; wanted: vatex_public_test_english_v1.1.json"),
    ("vatex", "validation", "[]", "names no clip"),
    ("vatex", "validation", [{"videoID": "abc_1_2", "enCap": ["a"]}], "'abc_1_2' is no clip"),
    ("vatex", "validation", [{"videoID": DASH, "enCap": ["a"]}], f"'{DASH}' is no clip"),
    ("vatex", "validation", [{"videoID": CLIP, "enCap": []}], f"empty ones: {CLIP}"),
    ("vatex", "validation", [{"videoID": CLIP, "enCap": [3]}], "are not a list of texts"),
    ("kinetics400", None, "abseiling/a.mp4 0\n", "no column label, .*wanted: validate.csv or"),
    ("kinetics400", None, K400_HEADER, "no row whose split is val or validate"),
    ("kinetics400", None, f"{K400_HEADER}yoga,#NAME?,1,2,val\n", "clip '#NAME.*' is no class and"),
    ("kinetics400", None, f"{K400_HEADER}yoga,{DASH},1.5,2,val\n", "is no class and clip"),
    ("kinetics400", None, f"{K400_HEADER},{DASH},1,2,val\n", "label '' .* is no class and clip"),
    ("kinetics400", None, f"{K400_HEADER}a,{DASH},1,2,val\nb,{DASH},01,2,val\n", "two labels, a a"),
    ("kinetics400", None,
     K400_HEADER + "".join(f"class {i},{i:011},1,2,val\n" for i in range(401)), "401 classes, not"),
    ("ucf101", "1", "1 YoYo\n", "is a file; wanted: the folder that holds classInd.txt"),
    ("ucf101", "01", "", "unknown split '01'; known: 1, 2, 3"),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "split", "content", "message"), WRONG_FILES)
def test_a_wrong_file_says_which_one_is_wanted(
    tmp_path: Path, protocol: str, split: str | None, content: object, message: str
) -> None:
    path = tmp_path / "some.file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    choices = {} if split is None else {"split": split}
    with pytest.raises(ValueError, match=message) as caught:
        protocols.read(protocol, path, videos=tmp_path, **choices)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("protocol", "split", "ids", "message"),
    [
        ("msrvtt", "1k-A.txt", "video8", "is called like the split '1k-A': give it another name"),
        ("msrvtt", "a.txt", "video8\nvideo1\nvideo2", "2 ids are not in .*: video1, video2$"),
        ("msrvtt", "a.txt", "\n \n", "is empty; wanted: an id list"),
        ("activitynet", "a.txt", f"{DASH}\n{GONE}", f"1 ids are not in .*val_1.json: v_{GONE}$"),
        ("activitynet", "a.txt", "video8", "a.txt: 'video8' is no v_ and YouTube id"),
        ("vatex", "a.txt", f"{GONE}_000002_000012", f"1 ids are not in .*: {GONE}_000002_000012"),
        ("vatex", "a.txt", "video8", "a.txt: 'video8' is no clip"),
        ("vatex", "test.txt", CLIP, "is called like the split 'test'"),
        ("vatex", "tst.npy", b"\x93NUMPY\xff", "is not UTF-8 text; wanted: an id list"),
    ],
)
def test_a_wrong_list_of_ids_names_them(
    tmp_path: Path, protocol: str, split: str, ids: str | bytes, message: str
) -> None:
    msrvtt_data(tmp_path)
    (tmp_path / "val_1.json").write_text(json.dumps({f"v_{DASH}": {"sentences": ["a"]}}))
    clips = [{"videoID": CLIP, "enCap": ["a"]}]
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(clips))
    path = tmp_path / split
    path.write_bytes(ids if isinstance(ids, bytes) else ids.encode())
    with pytest.raises(ValueError, match=message) as caught:
        protocols.read(protocol, tmp_path, videos=tmp_path, split=str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_vatex_languages(vatex_folder: Path) -> None:
    with pytest.raises(ValueError, match="English captions only"):
        vatex.read(vatex_folder, videos=vatex_folder, split="test", language="zh")
    with pytest.raises(ValueError, match="unknown language 'ch'; known: en, zh"):
        vatex.read(vatex_folder, videos=vatex_folder, language="ch")


def test_a_folder_without_the_file_and_videos_that_are_not_there(
    link: Link, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no MSRVTT_JSFUSION_test.csv; wanted: .*sentence"):
        msrvtt.read(tmp_path)
    path = tmp_path / "MSRVTT_JSFUSION_test.csv"
    path.write_text(CSV_HEADER + "ret0,msr1,video1,a\nret1,msr2,video2,b\n")
    with pytest.raises(ValueError, match="needs the folder of its video files: --videos"):
        msrvtt.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of videos .*nowhere not found"):
        msrvtt.read(tmp_path, videos=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="none of the 2 videos .* as video1.mp4"):
        msrvtt.read(tmp_path, videos=tmp_path)
    link(_1f308="video1.mp4", _1f31a="copy/video1.mkv")
    with pytest.raises(ValueError, match="two files for video video1: .*mp4 and .*mkv"):
        msrvtt.read(tmp_path, videos=tmp_path)


@pytest.mark.parametrize(
    ("classes", "clips", "message"),
    [
        ("1 YoYo", "Archery/v_Archery_g01_c01.avi", "class Archery is not in .*classInd.txt"),
        ("1 YoYo", "YoYo/v_YoYo_g01_c01.avi 1", "has the line .*wanted: testlist01.txt"),
        ("1 YoYo", "v_YoYo_g01_c01.avi", "has the line .*wanted: testlist01.txt"),
        ("YoYo", "YoYo/v_YoYo_g01_c01.avi", "has the line 'YoYo'; wanted: classInd.txt"),
    ],
)
def test_wrong_ucf101_lists(tmp_path: Path, classes: str, clips: str, message: str) -> None:
    (tmp_path / "classInd.txt").write_text(classes)
    with pytest.raises(FileNotFoundError, match="has no testlist01.txt"):
        ucf101.read(tmp_path, videos=tmp_path)
    (tmp_path / "testlist01.txt").write_text(clips)
    with pytest.raises(ValueError, match=message):
        ucf101.read(tmp_path, videos=tmp_path)


def test_tasks_are_of_their_kind(vatex_folder: Path) -> None:
    assert isinstance(protocols.read("vatex", vatex_folder, videos=vatex_folder), RetrievalTask)
    (vatex_folder / "val.csv").write_text(f"{K400_HEADER}yoga,{DASH},2,12,val\n")
    task = protocols.read("kinetics400", vatex_folder, videos=vatex_folder)
    assert isinstance(task, ClassificationTask)
