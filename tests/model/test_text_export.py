"""Text towers as ONNX: the same vectors without torch, weights rounded within their scales."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from fluxclip.model import text_export
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig, preset
from fluxclip.text.encoder import TextEncoder
from fluxclip.tokens.budget import GridTable

WORDS = ["<pad>", "<unk>", *(f"word{i}" for i in range(500))]


class WordBag(TextEncoder):
    """An encoder as somebody else might write one: a table, a layer of odd size, a mean."""

    width = 72
    max_tokens = 16

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(len(WORDS), 90)
        self.layer = torch.nn.Linear(90, self.width)
        words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
        self.tokenizer = Tokenizer(words)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
        self.tokenizer.enable_truncation(self.max_tokens)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        batch = self.tokenizer.encode_batch(list(texts))
        return torch.tensor([encoding.ids for encoding in batch])

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        return [len(text.split()) > self.max_tokens for text in texts]

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        weight_BL1 = (ids_BL != 0).float()[..., None]
        hidden_BLD = torch.tanh(self.layer(self.table(ids_BL)))
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)


class ExportableWordBag(WordBag):
    def tokenizer_json(self) -> str:
        return str(self.tokenizer.to_str())


def build(text: TextEncoder) -> FluxCLIP:
    torch.manual_seed(0)
    grids = GridTable((4, 56), ((64, 4, 56),))
    config = FluxCLIPConfig(video=preset("tiny", depth=1), dim=64, grids=grids)
    return FluxCLIP(config, text).eval()


def run(model: Path | bytes, **inputs: np.ndarray) -> np.ndarray:
    content = model.read_bytes() if isinstance(model, Path) else model
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_any_text_encoder_is_exported_for_any_batch_and_length(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = build(ExportableWordBag())
    text_export.write(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fp32.onnx", "int8.onnx", "tokenizer.json",
    ]  # fmt: skip
    said = capfd.readouterr()
    assert (said.out, said.err, list(recwarn)) == ("", "", [])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for texts in (["word1"], ["word2 word3 nothing", "", "word9 " * 40], ["word4 word5"] * 7):
        ids_BL = model.tokenize(texts)
        assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == ids_BL.tolist()
        with torch.no_grad():
            expected = model.encode_text(ids_BL).numpy()
        exact = run(tmp_path / "fp32.onnx", ids=ids_BL.numpy())
        np.testing.assert_allclose(exact, expected, atol=1e-5)
        rounded = run(tmp_path / "int8.onnx", ids=ids_BL.numpy())
        assert 0 < abs(rounded - expected).max() < 0.02


def test_an_encoder_without_a_tokenizer_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer of WordBag has no tokenizer.json"):
        text_export.write(build(WordBag()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_one_line(tmp_path: Path) -> None:
    class Untraceable(ExportableWordBag):
        def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("this code is never traced\nand more")

    with pytest.raises(ValueError, match="the text tower cannot be written as ONNX: ") as failure:
        text_export.write(build(Untraceable()), tmp_path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("k", [128, 90])  # 90: not a number of whole blocks
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Gather"])
def test_weights_are_kept_within_half_a_step_of_their_scale(operator: str, k: int) -> None:
    """x @ W with x the unit matrix, or rows looked up one by one: the weights themselves."""
    rng = np.random.default_rng(0)
    # sizes from 1e-3 to 1e3 side by side, and an output that is 0 throughout
    weight_KN = (rng.normal(size=(k, 200)) * 10.0 ** rng.uniform(-3, 3, (1, 200))).astype("f4")
    weight_KN[:, 7] = 0
    stored = weight_KN if operator == "MatMul" else weight_KN.T
    names = {"MatMul": ["x", "W"], "Gemm": ["x", "W"], "Gather": ["W", "x"]}[operator]
    options = {"transB": 1} if operator == "Gemm" else {}
    x = np.arange(200) if operator == "Gather" else np.eye(k, dtype=np.float32)
    kind = TensorProto.INT64 if operator == "Gather" else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **options)],
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(stored), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    text_export._round_weights(model.graph)
    assert "W" not in [tensor.name for tensor in model.graph.initializer]
    found = run(model.SerializeToString(), x=x)
    found_KN = found.T if operator == "Gather" else found
    step_N = abs(weight_KN).max(axis=0) / 127
    assert (abs(found_KN - weight_KN) <= step_N / 2 * 1.001).all()
    assert abs(found_KN - weight_KN).max() > 0
