"""The verbs that make model folders of published weights: convert ..."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fluxclip.cli.arguments import NewFolder, new_folder

if TYPE_CHECKING:
    from fluxclip.model.checkpoints.files import Converted

app = typer.Typer()
convert_app = typer.Typer(
    help="Make a model folder of weights that others have published.", no_args_is_help=True
)
app.add_typer(convert_app, name="convert")


@convert_app.command("internvideo2-clip")
def convert_internvideo2_clip(
    output: NewFolder,
    complete: Annotated[
        Path | None, typer.Option(help="one file with everything, such as model.safetensors")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(help="vision base; repeatable, the one that belongs is taken"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="MobileCLIP's file, mobileclip_blt.pt")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="what the last training changed, clip/X/pytorch_model.bin")
    ] = None,
    gelu: Annotated[
        Literal["tanh", "erf"] | None,
        typer.Option(help="by default erf with --complete, else tanh"),
    ] = None,
) -> None:
    """Convert InternVideo2-CLIP S/14, B/14 or L/14.

    Give --complete, or --base, --text and --overlay.
    """
    from fluxclip.model.checkpoints.internvideo2_clip import from_internvideo2_clip

    new_folder(output)
    made = from_internvideo2_clip(
        complete=complete, bases=base or [], text=text, overlay=overlay, gelu=gelu
    )
    _write_converted(made, output)


@convert_app.command("fluxvit")
def convert_fluxvit(
    checkpoint: Annotated[Path, typer.Argument(help="an official FluxViT-S or -B checkpoint")],
    output: NewFolder,
    projector: Annotated[
        int | None, typer.Option(help="keep only that of 3072, 2048 or 1024 tokens")
    ] = None,
    gelu: Annotated[Literal["tanh", "erf"], typer.Option(help="as in the training")] = "tanh",
    text: Annotated[
        str | None,
        typer.Option(
            help="ENCODER:SOURCE of another text tower, as in "
            "open_clip_tower:MobileCLIP-B/datacompdr_lt"
        ),
    ] = None,
) -> None:
    """Convert FluxViT's video tower, to be trained on.

    It comes without a text tower of its own: until it is trained it finds nothing by text.
    """
    from fluxclip.model.checkpoints.fluxvit import as_fluxclip
    from fluxclip.model.presets import TextConfig

    new_folder(output)
    tower = None
    if text is not None:
        encoder, colon, source = text.partition(":")
        if not (encoder and colon and source):
            raise ValueError(f"a text tower is named ENCODER:SOURCE, got {text!r}")
        tower = TextConfig(encoder, source, max_tokens=77)  # as many as CLIP's towers read
    made = as_fluxclip(checkpoint, gelu=gelu, projector=projector, text=tower)
    _write_converted(made, output)


@convert_app.command("open-clip")
def convert_open_clip(
    model: Annotated[
        str, typer.Argument(help="NAME/TAG or NAME/FILE, as in ViT-B-16/laion2b_s34b_b88k")
    ],
    output: NewFolder,
    frames: Annotated[
        int, typer.Option(min=1, help="in the position table, and of a clip by default")
    ] = 8,
) -> None:
    """Convert a ViT of open_clip to a video tower that attends over all frames."""
    from fluxclip.model.checkpoints.open_clip import from_open_clip

    new_folder(output)
    name, _, pretrained = model.partition("/")
    if not pretrained:
        raise ValueError(f"{model!r} names no weights: NAME/TAG or NAME/FILE")
    _write_converted(from_open_clip(name, pretrained, num_frames=frames), output)


def _write_converted(made: "Converted", output: Path) -> None:
    from fluxclip.model import weights
    from fluxclip.model.checkpoints.files import card

    weights.save(made.model, output, card=card(output.name, made.report))
    print("\n".join([made.report.about, *made.report.lines()]))
    print(f"model folder: {output}")
