"""What imports what: heavy libraries load only when they are used, and only in their home."""

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "faiss", "transformers", "open_clip", "matplotlib", "sentence_transformers")


def _heavy_modules_after(code: str) -> str:
    script = f"{code}\nimport sys\nprint('loaded:', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import fluxclip",
        "import retrieval",
        "import fluxclip.plugins",
        "import fluxclip.cli",
    ],
)
def test_import_loads_no_heavy_library(code: str) -> None:
    assert _heavy_modules_after(code) == "loaded: []"


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['fluxclip', '--help']\n"
        "from fluxclip.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert _heavy_modules_after(code) == "loaded: []"


def test_lazy_names_of_the_package_are_the_real_ones() -> None:
    import fluxclip
    from fluxclip import embedder

    assert fluxclip.load_model is embedder.load_model
    assert fluxclip.Embedder is embedder.Embedder
    assert set(dir(fluxclip)) >= {"load_model", "Embedder", "__version__"}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fluxclip.no_such_name  # type: ignore[attr-defined]


def _imports(tree: ast.AST, module: str) -> bool:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        if any(f"{name}.".startswith(f"{module}.") for name in names):
            return True
    return False


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed.nn import all_gather", True),
        ("def f():\n    import torch\n    torch.distributed.barrier()", True),
        ("import torch\nfrom torch.nn import functional", False),
        ("from .distributed import world_size", False),
    ],
)
def test_the_search_for_a_module_sees_every_spelling(code: str, found: bool) -> None:
    assert _imports(ast.parse(code), "torch.distributed") is found


@pytest.mark.parametrize(
    ("module", "home"),
    [
        ("torch.distributed", "fluxclip/distributed.py"),
        ("torch.utils.tensorboard", "fluxclip/training/"),
    ],
)
def test_parts_of_torch_have_one_home(module: str, home: str) -> None:
    """import-linter sees external packages as a whole, so these rules are checked here."""
    users = [
        path.relative_to(ROOT).as_posix()
        for package in ("fluxclip", "retrieval")
        for path in sorted((ROOT / package).rglob("*.py"))
        if _imports(ast.parse(path.read_text("utf-8")), module)
    ]
    assert [user for user in users if not user.startswith(home)] == []


def test_retrieval_takes_only_public_names_from_fluxclip() -> None:
    """The import contracts stop at modules: `load_model` is a name, so it is checked here."""
    taken = {
        alias.name
        for path in (ROOT / "retrieval").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "fluxclip"
        for alias in node.names
    }
    assert taken <= {"load_model", "plugins", "video"}


def test_suite_cannot_reach_the_network() -> None:
    with pytest.raises(PermissionError, match="tests use no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(PermissionError, match="tests use no network"):
        socket.getaddrinfo("example.org", 80)
