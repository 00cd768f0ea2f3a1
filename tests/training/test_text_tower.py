"""A text tower trained from scratch with the video tower: the recipe, the run, queries by it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import QUIET, metrics, read

from fluxclip import load_model
from fluxclip.model import weights
from fluxclip.text import tokenizer
from fluxclip.text.tokenizer import EncoderSize
from fluxclip.training.loop import train
from retrieval.query_encoder import QueryEncoder, export_text_encoder

STEPS = 6


def test_both_towers_learn_and_queries_need_no_torch(changes: list[str], tmp_path: Path) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    captions = [caption for record in records for caption in record["caption"]]
    source = tmp_path / "tokenizer"
    size = EncoderSize(width=64, depth=2, heads=4)
    tokenizer.write(source, tokenizer.train(captions, pieces=450), size)
    recipe = read(
        [
            *changes, f"optimizer.steps={STEPS}", "optimizer.warmup_steps=1",
            f"validation.every={STEPS}", "text.encoder=sentencepiece_transformer",
            f"text.source={source}", "text.weights=stored", "text.max_tokens=24",
            "negatives=step",
        ]
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    start = weights.build(recipe.model_config()).state_dict()
    folder = train(recipe, console=QUIET)
    losses = [row["loss"] for row in metrics(folder) if "loss" in row]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    trained = load_model(folder / "last")
    state = trained.model.state_dict()
    names = [name for name in state if name.startswith("text.")]
    assert len(names) == 2 + 2 * 12 + 2
    for name in names:
        assert not torch.equal(state[name], start[name]), name
    manifest = export_text_encoder(trained, tmp_path / "exported", captions=captions)
    assert manifest["lowest_cosine"] > 0.99
    queries = ["a red heart", "Собака", ""]
    exported = QueryEncoder(tmp_path / "exported").embed_text(queries)
    assert (exported * trained.embed_text(queries)).sum(axis=1).min() > 0.99


def test_a_missing_tokenizer_leaves_no_run_folder(changes: list[str], tmp_path: Path) -> None:
    wanted = ["text.encoder=sentencepiece_transformer", "text.source=/no/such/tokenizer"]
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        train(read([*changes, *wanted, "text.weights=stored"]), console=QUIET)
    assert not (tmp_path / "run").exists()
