"""One place for each thing: what the syntax trees of runner/ must show.

A section a rule. A rule looks at every module but those that are its one place, and names file, line and what it found.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from runner.cluster.backends import BACKENDS
from runner.node import protocol, requests
from runner.plan.engines.registry import ENGINES
from runner.workloads.registry import TESTS

RUNNER = Path(__file__).resolve().parents[2] / "runner"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def modules(*doors: str) -> list[Path]:
    """The modules behind these doors, or all, in a fixed order."""
    return sorted(path for path in RUNNER.rglob("*.py") if not doors or path.relative_to(RUNNER).parts[0] in doors)


def name_of(path: Path) -> str:
    return path.relative_to(RUNNER).as_posix()


def docstrings(tree: ast.Module) -> set[ast.AST]:
    """The constants that stand alone as a statement."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def texts(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Every string in a module that is no docstring; what an f-string fills in is `{}`."""
    apart = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            apart.update(node.values)
            yield node, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in apart:
            yield node, node.value


def found(places: list[Path], rule: Callable[[ast.Module], Iterator[tuple[ast.AST, str]]], *but: str) -> list[str]:
    """What a rule finds in these modules, but those that are its one place."""
    return [
        f"{name_of(path)}:{getattr(node, 'lineno', 0)}: {what}"
        for path in places
        if name_of(path) not in but
        for node, what in rule(tree_of(path))
    ]


# --- files of a cell's folder: results/celldir.py ------------------------------------------------------

CELL_FILE = re.compile(
    r"(job|facts|outcome)\.json|(messages|telemetry)\.jsonl|engine\.std(out|err)|rank(\*|\{\}|\d+)\.(jsonl|stdout|stderr)"
)


def cell_files(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    return ((node, text) for node, text in texts(tree) if CELL_FILE.search(text))


def test_one_module_knows_the_names_of_the_files_in_a_cells_folder():
    assert found(modules(), cell_files, "results/celldir.py") == []
    assert found([RUNNER / "results" / "celldir.py"], cell_files), "the rule finds them where they are"


# --- words, messages and requests: node/protocol.py ------------------------------------------------------

WORDS = {*protocol.Word, *protocol.Stopped}
MESSAGES = set(protocol._MESSAGES)
REQUESTS = (requests.CheckRequest, requests.CellRequest, requests.StepRequest)
ANSWERS = (protocol.Outcome, protocol.Placed, protocol.Line, protocol.Checked)
KEYS = {"kind", "message", *(field.name for each in (*REQUESTS, *ANSWERS) for field in fields(each))}
OWNERS = re.compile(r"(request|message|outcome|answer|step|own)s?")


def compared(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Words and kinds of messages that are compared, returned, or listed, as literals."""
    for node in ast.walk(tree):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Return):
            parts = [node.value]
        elif isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        parts += [each for part in parts if isinstance(part, ast.Tuple | ast.Set | ast.List) for each in part.elts]
        for part in parts:
            if isinstance(part, ast.Constant) and part.value in WORDS | MESSAGES:
                yield part, repr(part.value)


def identifier(node: ast.expr) -> str:
    """What is looked into: `outcomes` in `self.outcomes[host]` and in `outcomes.get(host, {})`."""
    while True:
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        else:
            return getattr(node, "attr", getattr(node, "id", ""))


def keys_read(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Keys of requests and messages that are asked for as literals: `request["cell"]`, `outcome.get("rc")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            owner, key = node.func.value, node.args[0]
        else:
            continue
        if isinstance(key, ast.Constant) and key.value in KEYS and OWNERS.fullmatch(identifier(owner)):
            yield node, ast.unparse(node)


@pytest.mark.parametrize("rule", [compared, keys_read])
def test_one_module_knows_how_controller_and_agents_talk(rule):
    assert found(modules("node", "launch"), rule, "node/protocol.py") == []


def test_the_rules_find_what_they_are_to_find():
    tree = ast.parse('if word in ("stop", "x") or request["cell_dir"] == self.outcomes.get(h, {})["rc"]: pass')
    assert [what for _, what in compared(tree)] == ["'stop'"]
    assert sorted(what for _, what in keys_read(tree)) == [
        "request['cell_dir']",
        "self.outcomes.get(h, {})['rc']",
    ]


# --- the mark of a cell's processes: system/process.py --------------------------------------------------


def marks(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    return ((node, text) for node, text in texts(tree) if "SHAKEDOWN_CELL" in text)


def test_one_module_names_the_variable_that_marks_a_cells_processes():
    assert found(modules(), marks, "system/process.py") == []


# --- what depends on a test, an engine or a backend asks its row, never what it is called -----------------------

REGISTRIES = {"workloads/registry.py": TESTS, "plan/engines/registry.py": ENGINES, "cluster/backends.py": BACKENDS}
# The same word for something else.
ALIKE = {
    "'slurm' in overrides": "a section of --set",
    "one.name == 'gpu'": "Slurm's kind of resource",
    "values.ansible_connection != 'local'": "Ansible's connection",
    "values.ansible_connection == 'local'": "Ansible's connection",
}


def literals(tree: ast.AST) -> Iterator[str]:
    """The string literals that an expression is, or that are the elements of the tuple, list or set that it is."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    elif isinstance(tree, ast.Tuple | ast.List | ast.Set):
        for element in tree.elts:
            yield from literals(element)


def compared_texts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(where, literal) of every string that is compared with ==, !=, in, not in, or by a case of `match`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                yield from ((node, text) for text in literals(side))
        elif isinstance(node, ast.MatchValue):
            yield from ((node, text) for text in literals(node.value))


def named_in(path: str, tree: ast.AST) -> list[str]:
    """The comparisons of a module with a name of a registry that is not the module itself. `none` is a value of many
    settings as well: that counts where an engine is compared.
    """
    names = {name for registry, rows in REGISTRIES.items() if registry != path for name in rows}
    return [
        f"{path}: {ast.unparse(where)}"
        for where, text in compared_texts(tree)
        if text in names and ast.unparse(where) not in ALIKE and (text != "none" or "engine" in ast.unparse(where))
    ]


def test_no_name_of_a_test_an_engine_or_a_backend_is_compared_outside_its_registry() -> None:
    assert [each for path in modules() for each in named_in(name_of(path), tree_of(path))] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('cell.test == "sft"', True),
        ('"torch" != cell["test"]', True),
        ('"sft" in request.tests', True),
        ('backend not in ("ssh", "slurm")', True),
        ('(test, state) == ("sft", "complete")', True),
        ('match engine:\n case "deepspeed" | "other":\n  pass', True),
        ('plan.engine == "none"', True),
        ('sft.split == "none"', False),
        ('TESTS["sft"]', False),
        ('cell.state == "complete"', False),
        ("values.ansible_connection == 'local'", False),
    ],
)
def test_a_compared_name_is_found_in_any_form(code: str, found: bool) -> None:
    assert bool(named_in("somewhere.py", ast.parse(code))) is found


# --- what depends on a transport asks it, never what it is -------------------------------------------------------

TRANSPORTS = {"Agents", "Allocations"}


def transports_asked(tree: ast.AST) -> Iterator[ast.Call]:
    """Every isinstance or issubclass with a transport among its classes, alone, in a tuple or by its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            parts = list(ast.walk(node.args[1]))
            names = {part.id for part in parts if isinstance(part, ast.Name)}
            names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
            if node.func.id in ("isinstance", "issubclass") and names & TRANSPORTS:
                yield node


def test_nothing_asks_which_transport_it_has() -> None:
    assert [f"{name_of(path)}: {ast.unparse(c)}" for path in modules() for c in transports_asked(tree_of(path))] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("isinstance(carrier, Allocations)", True),
        ("isinstance(self.transport, (allocations.Allocations, Agents))", True),
        ("isinstance(carrier, Agents | None)", True),
        ("isinstance(carrier, dict)", False),
        ("Allocations(run)", False),
    ],
)
def test_asking_which_transport_is_found_in_any_form(code: str, found: bool) -> None:
    assert bool(list(transports_asked(ast.parse(code)))) is found


# --- who plans and judges loads a test's modules through its row ---------------------------------------------------

FOLDERS = {row.metrics.split(".")[2] for row in TESTS.values()}


def folders_imported(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Imports of a module in a test's folder."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[:2] == ["runner", "workloads"] and len(parts) > 2 and parts[2] in FOLDERS:
                yield node, name


def test_who_judges_knows_no_test() -> None:
    assert found(modules("judge", "launch", "cli"), folders_imported) == []
    assert found(modules("report"), folders_imported), "a test's own report module does"


# --- what is public has a docstring ------------------------------------------------------------------------------

# Exempt: names with an underscore, and what is inside them; nested functions, which only their function calls;
# properties, which are read like the fields that the docstring of their class explains; @overload, whose implementation
# has the docstring; and a method that implements one which a base class in the same module documents.
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
EXEMPT_DECORATORS = {"property", "cached_property", "setter", "overload"}


def decorators(node: Documented) -> set[str]:
    """The last part of each decorator's name: `setter` of `@name.setter`, `command` of `@click.command("run")`."""
    calls = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {identifier(call) for call in calls}


def public(body: list[ast.stmt]) -> Iterator[Documented]:
    """The public classes and functions in a body, also those behind an `if` or a `try`."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            handled = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from public([*node.body, *node.orelse, *handled])


def undocumented(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The module, classes, functions and methods without a docstring that need one."""
    if not ast.get_docstring(tree):
        yield tree, "the module"
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in public(tree.body):
        yield from _undocumented(node, "", classes)


def _undocumented(node: Documented, within: str, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[ast.AST, str]]:
    name = f"{within}{node.name}"
    if not ast.get_docstring(node) and not decorators(node) & EXEMPT_DECORATORS:
        yield node, name
    if isinstance(node, ast.ClassDef):
        inherited = {
            method.name
            for base in node.bases
            if identifier(base) in classes
            for method in public(classes[identifier(base)].body)
            if ast.get_docstring(method)
        }
        for member in public(node.body):
            if member.name not in inherited:
                yield from _undocumented(member, f"{name}.", classes)


def test_what_is_public_has_a_docstring() -> None:
    places = [path for path in modules() if not path.stem.startswith("_") or path.stem in ("__init__", "__main__")]
    assert found(places, undocumented) == []


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("x = 1", ["the module"]),
        ('"m"\ndef f(): pass', ["f"]),
        ('"m"\nasync def f(): pass', ["f"]),
        ('"m"\ndef f():\n "f"', []),
        ('"m"\ndef f():\n "f"\n def g(): pass', []),
        ('"m"\ndef _f(): pass\nclass _C:\n def f(self): pass', []),
        ('"m"\nclass C:\n def f(self): pass', ["C", "C.f"]),
        ('"m"\nclass C:\n "C"\n def __init__(self): pass\n @property\n def p(self): pass', []),
        ('"m"\nclass C:\n "C"\n @classmethod\n def f(cls): pass', ["C.f"]),
        ('"m"\nclass A:\n "A"\n def f(self): "f"\nclass B(A):\n "B"\n def f(self): pass\n def g(self): pass', ["B.g"]),
        ('"m"\n@typing.overload\ndef f(x: int): ...\n@click.command("f")\ndef f(x): pass', ["f"]),
        ('"m"\nif x:\n def f(): pass\nelse:\n def g(): pass', ["f", "g"]),
    ],
)
def test_a_missing_docstring_is_found_in_any_form(code: str, missing: list[str]) -> None:
    assert [what for _, what in undocumented(ast.parse(code))] == missing


# --- the words of the field: fix, gracefully, no output ----------------------------------------------------------

BREAK = r"[\s#]+"  # also from one line of a comment to the next
DIALECT = re.compile(rf"\b(mend(s|ed|ing)?|good{BREAK}order|no{BREAK}word)\b", re.IGNORECASE)


def dialect(text: str) -> list[tuple[int, str]]:
    """(line, words) of what is not standard English in a module: in its strings, comments and names."""
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in DIALECT.finditer(text)]


def test_the_words_are_those_of_the_field() -> None:
    assert [f"{name_of(p)}:{line}: {words}" for p in modules() for line, words in dialect(p.read_text())] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('raise UsageError("mend slurm.account")', True),
        ("x = 1  # the mended one", True),
        ('"""Stop a run in good\norder."""', True),
        ("# there was no\n# word from it", True),
        ('"No word"', True),
        ('"amend, recommended, in no order, no words"', False),
    ],
)
def test_dialect_is_found_in_any_form(text: str, found: bool) -> None:
    assert bool(dialect(text)) is found


# --- numbers and their nouns ------------------------------------------------------------------------

COUNTED = re.compile(r"\{\} (more |other |complete |bad |good )?(nodes|cells|GPUs|ranks|jobs|tasks|repeats|runs)\b")

NUMBER = re.compile(r"^(len|max|sum)\(|^count$|size$|most$|^number$|num_|gpus|shared")


def numbers_with_plurals(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """f-strings in which a number is followed by a plural, which is wrong for 1."""
    for node in ast.walk(tree):
        for part, after in pairwise(node.values) if isinstance(node, ast.JoinedStr) else ():
            if not (isinstance(part, ast.FormattedValue) and isinstance(after, ast.Constant)):
                continue
            number = NUMBER.search(ast.unparse(part.value).rpartition("[")[0] or ast.unparse(part.value))
            if (words := COUNTED.match(f"{{}}{after.value}")) and number:
                yield node, f"{ast.unparse(part.value)}: {words[0]}"


def test_one_function_writes_numbers_with_their_nouns():
    assert found(modules(), numbers_with_plurals) == []
    assert list(numbers_with_plurals(ast.parse('f"{len(nodes)} nodes"'))), "the rule finds them"


# --- unit tests run in seconds, and what they ask of an environment without torch is not answered by one that is loaded


def test_no_unit_test_imports_torch_when_it_is_collected() -> None:
    heavy = {"torch", "deepspeed", "transformers"}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in tree_of(path).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not heavy & {name.partition(".")[0] for name in names}, f"{path}: belongs to tests/local"


def test_test_files_have_names_of_their_own() -> None:
    """pytest collects none of two that it imports by the same name."""
    files = [
        path for path in RUNNER.with_name("tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()
    ]
    names = Counter(path.name for path in files)
    assert [name for name, count in names.items() if count > 1] == []
