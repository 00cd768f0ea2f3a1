"""The console command `fluxclip`: one thin function per verb, the work is done elsewhere.

Heavy imports are inside the verbs, so that `fluxclip --help` answers at once.
"""

import os
import sys
from typing import Annotated

import typer

from fluxclip.cli import (
    chunk,
    convert,
    demo_doctor,
    index,
    models,
    search,
    shards,
    tokenizer,
    train_eval,
)
from fluxclip.cli.output import say

app = typer.Typer(
    help="Train video-text models that run at any token budget, score them, and search with them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verbs in (
    train_eval, models, convert, tokenizer, chunk, shards, index, search, demo_doctor
):  # fmt: skip
    app.add_typer(verbs.app)  # without a name: its verbs become verbs of `fluxclip`, in this order


def main() -> None:
    """Run the command; a mistake of the user is one line and exit code 2, Ctrl-C exit code 130."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
        if "\n" in message:  # no arguments: the help
            say(message)
        else:
            say(f"fluxclip: {message} (see fluxclip --help)")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as error:  # what typer makes of Ctrl-C
        code = error.code
    except BrokenPipeError:
        # the reader of a pipe, such as head, has gone: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        for line in (str(error) or type(error).__name__).splitlines():
            say(f"fluxclip: {line}{_notes(error)}")
        code = 2
    except Exception as error:  # ours, not the user's
        if debug:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason += _notes(error)
        say(f"fluxclip: internal error: {reason}; please report it with --debug's traceback")
        code = 2
    if code == 130:
        say("fluxclip: stopped; what was finished is kept")
    code = code if isinstance(code, int) else 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # libraries of a job's processes have threads that can abort one while Python takes itself
        # down, long after its work was done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _notes(error: Exception) -> str:
    """What was noted on an error's way up, such as the file that was being read, in brackets."""
    notes = dict.fromkeys(getattr(error, "__notes__", ()))
    return f" ({'; '.join(' '.join(note.split()) for note in notes)})" if notes else ""


def _print_version(wanted: bool) -> None:
    if wanted:
        from fluxclip import __version__

        print(f"fluxclip {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="print the version and stop"
        ),
    ] = False,
) -> None:
    """What every verb takes; --debug is read in `main`, before any verb can fail."""
