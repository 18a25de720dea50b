"""Reads every import and says so where it goes up, sideways or through a back door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("shm", "transport", "engine")  # each may import those before it, through their __init__ alone

# Files of a folder by rank, the lowest first. A file imports lower ranks of its own folder only; equals don't
# know each other. `__init__` is above all of them. A new file gets its place here.
RANKS: dict[str, list[set[str]]] = {
    "shm": [
        {"errors", "layout", "words", "handle", "mapping"},
        {"extents", "liveness", "memory", "record", "tenure"},
        {"segment", "ledger"},
        {"columns", "look", "placement"},
        {"shares"},
        {"reader", "writer", "inspect"},
    ],
    "transport": [
        {"cudart", "errors"},
        {"config", "process", "registration", "specs"},
        {"devices"},
        {"sharing", "sources", "staging"},
        {"tensors"},
        {"codec", "message", "waiting"},
        {"addresses", "backends.base", "backends.ring_messages", "curve"},
        {"backends.budget", "backends.records", "backends.shm_inbound", "assembly", "wire", "registry"},
        {"backends.inline", "backends.frames", "backends.shm", "link"},
        {"bulk.frames", "bulk.poller", "bulk.terms"},
        {"bulk.cargo"},
        {"bulk.connection", "bulk.transfer", "bulk.landing", "bulk.lodging"},
        {"bulk.crossing", "bulk.handshake", "bulk.tls"},
        {"bulk.neighbours"},
        {"bulk.arriving"},
        {"bulk.channel"},
        {"bulk.meeting"},
        {"bulk.hub"},
        {"backends.cuda", "backends.tcp"},
        {"backends.auto", "roster"},
        {"departures", "lateness", "received"},
        {"introducing"},
        {"sending"},
        {"receiving"},
        {"exchange"},
        {"endpoint"},
        {"conformance.samples"},
        {"conformance.peers"},
        {"conformance.pair"},
        {"conformance.suite"},
        {"conformance"},
    ],
    "engine": [
        {"console", "errors", "images", "options", "parallel", "segments", "signals"},
        {"config", "folders", "keys", "loading", "model", "ps", "results", "staging", "top"},
        {"vllm.guard", "vllm.points", "vllm.settings"},
        {"vllm.counts", "vllm.mailbox"},
        {"vllm.check", "vllm.roles"},
        {"vllm.pickling"},
        {"vllm_plugin"},
        {"doctor", "environment", "huggingface", "output", "protocol", "report", "sweep"},
        {"catalog"},
        {"job", "launch", "worker"},
        {"headless"},
        {"cluster"},
        {"fleet"},
        {"dispatch"},
        {"client"},
        {"cli"},
        {"__main__"},
    ],
}

# transport uses shm in its backends alone; who looks at segments, not at messages, may look at shm itself.
DOORS_TO_SHM = {
    "transport.backends.shm",
    "transport.backends.ring_messages",
    "transport.backends.shm_inbound",
    "transport.backends.cuda",
    "transport.backends.records",
    "engine.ps",
    "engine.segments",
    "engine.top",
    "engine.sweep",
    "engine.doctor",
    "engine.vllm.settings",
}

# Beside the standard library.
LIBRARIES = {
    "shm": {"posix_ipc"},
    "transport": {"msgspec", "numpy", "torch", "zmq"},
    "engine": {"PIL", "click", "msgspec", "numpy", "rich", "safetensors", "torch"},
}
MORE_LIBRARIES = {
    "engine.cluster": {"ray"},  # an optional extra, imported when it is asked for
    "engine.doctor": {"zmq"},  # its version, and that of the library in it
    "engine.huggingface": {"transformers"},
    "engine.vllm.counts": {"prometheus_client"},  # where vLLM is, it is
    "engine.vllm.pickling": {"vllm"},
    "engine.vllm_plugin": {"vllm", "zmq"},
    "shm.columns": {"numpy"},
    "shm.ledger": {"numpy"},
    "shm.reader": {"numpy"},
    "shm.shares": {"numpy"},
    "shm.writer": {"numpy"},
    "transport.bulk.tls": {"cryptography"},  # an extra
    "transport.conformance.suite": {"pytest"},  # for third parties' tests; nothing of the package imports it
}

# They run code from data, or clean up behind our back: a resource tracker removes what others still use.
FORBIDDEN_MODULES = {
    "cloudpickle",
    "dill",
    "marshal",
    "multiprocessing.managers",
    "multiprocessing.resource_tracker",
    "multiprocessing.shared_memory",
    "pickle",
    "shelve",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# What is imported by name is chosen by the local operator here, never by a peer.
IMPORT_BY_NAME = {"transport.registry", "engine.model", "engine.vllm.points"}

Complaint = tuple[int, str]  # line, what is wrong


def modules(folder: str) -> list[str]:
    """Dotted names of a folder's files, `__init__` included."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def source(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, lazy ones and those for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, _target(start, name.name)


def _target(start: str, name: str) -> str:
    """`from shm import layout` means the module shm.layout, `from shm import RingWriter` the door of shm."""
    full = f"{start}.{name}"
    folder = start.split(".", 1)[0]
    return full if folder not in FOLDERS or rank(full) >= 0 or _is_folder(full) else start


def _is_folder(target: str) -> bool:
    """Whether a dotted name is a folder of files, such as transport.backends."""
    top, _, rest = target.partition(".")
    return any(name.startswith(f"{rest}.") for row in RANKS[top] for name in row)


def rank(module: str) -> int:
    """Where a module stands in its folder; -1 where the table doesn't have it."""
    folder, _, name = module.partition(".")
    if name == "__init__":
        return len(RANKS[folder])
    return next((place for place, names in enumerate(RANKS[folder]) if name in names), -1)


def wrong_imports(module: str, text: str) -> list[Complaint]:
    """What a product module imports and may not."""
    targets = dict.fromkeys(imported(module, ast.parse(text)))  # several names of one file are one import
    return [(line, what) for line, target in targets if (what := _wrong_import(module, target))]


def _wrong_import(module: str, target: str) -> str:
    ours, theirs = module.split(".", 1)[0], target.split(".", 1)[0]
    if any(target == name or target.startswith(name + ".") for name in FORBIDDEN_MODULES):
        return f"{target} is never imported in the product"
    if theirs in ("bench", "tests"):
        return f"{target} is no part of the product"
    if theirs not in FOLDERS:
        allowed = LIBRARIES[ours] | MORE_LIBRARIES.get(module, set()) | sys.stdlib_module_names
        return "" if theirs in allowed else f"{theirs} is not among the libraries of {ours}"
    if theirs == ours:
        return _wrong_sibling(module, target)
    if FOLDERS.index(theirs) > FOLDERS.index(ours):
        return f"{target} lies above {ours}: imports go down only"
    if theirs == "shm" and module not in DOORS_TO_SHM:
        return "shm is imported by " + ", ".join(sorted(DOORS_TO_SHM)) + " only"
    return "" if target == theirs else f"{target} is a back door: import from {theirs}"


def _wrong_sibling(module: str, target: str) -> str:
    folder = module.split(".", 1)[0]
    if target == folder:
        return f"{folder}'s own files import each other, not their door"
    if _is_folder(target):  # its __init__ is a docstring
        return f"{target} holds nothing itself: import one of its files"
    if rank(target) < 0:
        return f"{target} has no place in RANKS"
    if rank(module) < 0:  # said once, by test_every_product_file_has_a_rank
        return ""
    return "" if rank(target) < rank(module) else f"{target} does not rank below {module}"


def wrong_words(module: str, text: str) -> list[Complaint]:
    """What a product module contains and may not."""
    return [
        (getattr(node, "lineno", 0), word)
        for node in ast.walk(ast.parse(text))
        if (word := _wrong(module, node))
    ]


def _wrong(module: str, node: ast.AST) -> str:
    match node:
        case ast.FunctionDef(name="__del__"):
            return "__del__: cleaning up is close(), `with`, or a finalizer of weakref"
        case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
            return f"{name}() runs text as code"
        case ast.Call(func=ast.Attribute(attr="import_module")) if module not in IMPORT_BY_NAME:
            return "import_module(): only where the operator chooses what is imported"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
            return "torch.load() unpickles"
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            return "allow_pickle=True"
        case ast.ExceptHandler(type=None):
            return "a bare except also catches SystemExit and KeyboardInterrupt"
        case ast.ExceptHandler(type=caught, body=[ast.Pass() | ast.Continue()]) if _is_broad(caught):
            return "swallows every exception"
        case ast.Call(func=ast.Attribute(attr="suppress") | ast.Name(id="suppress"), args=names):
            return "swallows every exception" if any(map(_is_broad, names)) else ""
    return ""


def _is_broad(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names)


def shown(module: str, complaints: list[Complaint]) -> str:
    return "\n".join(f"{module.replace('.', '/')}.py:{line}: {what}" for line, what in complaints)


PRODUCT = [module for folder in FOLDERS for module in modules(folder)]
EVERYTHING = [*PRODUCT, *modules("bench"), *modules("tests"), *modules("examples")]


@pytest.mark.parametrize("module", PRODUCT)
def test_imports_go_down_and_through_the_door(module: str) -> None:
    complaints = wrong_imports(module, source(module))
    assert not complaints, "\n" + shown(module, complaints)


@pytest.mark.parametrize("module", PRODUCT)
def test_product_contains_nothing_forbidden(module: str) -> None:
    complaints = wrong_words(module, source(module))
    assert not complaints, "\n" + shown(module, complaints)


def test_every_product_file_has_a_rank() -> None:
    unknown = [
        name for name in PRODUCT if name.count(".") == 1 or not name.endswith("__init__") if rank(name) < 0
    ]
    assert not unknown, f"give {', '.join(unknown)} a place in RANKS"


def test_no_file_has_two_ranks() -> None:
    for folder, ranks in RANKS.items():
        names = [name for row in ranks for name in row]
        assert len(names) == len(set(names)), folder


@pytest.mark.parametrize("module", EVERYTHING)
def test_every_module_starts_by_saying_what_it_is_for(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(source(module)), clean=False)
    assert docstring, f"{module} has no docstring"
    assert docstring.split("\n")[0].strip(), f"the first line of {module}'s docstring is empty"


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("shm.writer", "import transport", "lies above"),
        ("shm.segment", "import torch", "not among the libraries"),
        ("shm.layout", "import numpy as np", "not among the libraries"),
        ("shm.layout", "from shm.segment import create", "does not rank below"),
        ("shm.layout", "from .errors import ShmError", "does not rank below"),
        ("shm.segment", "from shm import layout, writer", "shm.writer does not rank below"),
        ("shm.segment", "from shm import Lease", "not their door"),
        ("shm.segment", "def f():\n    import pickle", "never imported"),
        ("shm.segment", "from multiprocessing import shared_memory", "never imported"),
        ("shm.segment", "from multiprocessing import resource_tracker", "never imported"),
        ("transport.endpoint", "import shm", "is imported by"),
        ("transport.backends.shm", "from shm.errors import ShmError", "back door"),
        ("transport.backends.shm", "import shm.errors", "back door"),
        ("transport.backends.shm", "from transport.backends import tcp", "tcp does not rank below"),
        ("transport.backends.shm", "from .tcp import connect", "tcp does not rank below"),
        ("transport.endpoint", "from transport import backends", "holds nothing itself"),
        ("transport.codec", "import PIL", "not among the libraries"),
        ("engine.cli", "from transport.endpoint import listen", "back door"),
        ("engine.cli", "import shm", "is imported by"),
        ("engine.cli", "from bench.harness import run", "no part of the product"),
        ("engine.worker", "if TYPE_CHECKING:\n    from engine.cli import main", "does not rank below"),
        ("engine.cli", "from engine.no_such_file import option", "has no place in RANKS"),
    ],
)
def test_sees_a_wrong_import(module: str, line: str, complaint: str) -> None:
    found = wrong_imports(module, line)
    assert len(found) == 1
    assert complaint in found[0][1]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("shm.segment", "import os\nimport posix_ipc\nfrom shm.layout import MAGIC"),
        ("shm.segment", "from shm import layout"),
        ("shm.writer", "import numpy as np"),
        ("shm.__init__", "from shm.inspect import sweep"),
        ("transport.backends.shm", "import shm\nfrom shm import RingWriter"),
        ("transport.endpoint", "import zmq\nfrom transport.backends.base import Outbound"),
        ("engine.ps", "import shm"),
        ("engine.cli", "import transport\nfrom engine.config import EngineConfig"),
    ],
)
def test_lets_a_right_import_pass(module: str, line: str) -> None:
    assert wrong_imports(module, line) == []


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def __del__(self): ...",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "importlib.import_module(name)",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
        "try: f()\nexcept: g()",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (OSError, BaseException): pass",
        "with contextlib.suppress(Exception): f()",
    ],
)
def test_sees_a_forbidden_word(text: str) -> None:
    assert len(wrong_words("engine.worker", text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile('x')",
        "try: f()\nexcept FileNotFoundError: pass",
        "try: f()\nexcept Exception as error: report(error)",
        "with contextlib.suppress(FileNotFoundError): f()",
        "np.load(file, allow_pickle=False)",
    ],
)
def test_lets_other_words_pass(text: str) -> None:
    assert wrong_words("engine.worker", text) == []
