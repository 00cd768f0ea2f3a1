"""The verb that makes a vocabulary: tokenizer train."""

from pathlib import Path
from typing import Annotated

import typer

from fluxclip.cli.arguments import NewFolder

app = typer.Typer()
tokenizer_app = typer.Typer(
    help="Make the vocabulary of a text encoder that is trained from scratch.",
    no_args_is_help=True,
)
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.command("train")
def train_tokenizer(
    captions: Annotated[
        list[Path], typer.Argument(help="annotation files (.json), or texts with a caption a line")
    ],
    output: NewFolder,
    vocabulary: Annotated[int, typer.Option(min=1, help="pieces, 256 bytes among them")] = 8000,
    width: Annotated[int, typer.Option(min=1, help="of the encoder that is trained over it")] = 256,
    depth: Annotated[int, typer.Option(min=1, help="its blocks")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="its attention heads")] = 4,
) -> None:
    """Learn a SentencePiece vocabulary from captions in any language.

    A recipe names the folder in its section [text]: encoder = "sentencepiece_transformer", source =
    FOLDER, weights = "stored".
    """
    from fluxclip.text import tokenizer

    tokenizer.refuse_existing(output)
    size = tokenizer.EncoderSize(width=width, depth=depth, heads=heads)
    texts = [caption for path in captions for caption in _captions_in(path)]
    tokenizer.write(output, tokenizer.train(texts, pieces=vocabulary), size)
    print(f"{output}: {vocabulary} pieces learned from {len(texts)} captions")


def _captions_in(path: Path) -> list[str]:
    """Every caption of an annotation file; of another file, every line that is not blank."""
    if path.suffix == ".json":
        from fluxclip.data.sources import annotations

        records = annotations.read(path, check_files=False)
        return [caption for record in records for caption in record.captions]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text with a caption on each line") from error
    return [line for line in lines if line.strip()]
