"""The style of the house, as tests that read the source: see the rules in each test's name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "true_kd"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
TEXTS = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml")] + sorted(
    (ROOT / "configs").glob("*.yaml")
)

# From the face down to the ground: a module imports from lower floors only. A package stands on one floor.
FLOORS = (
    ("__main__",),
    ("cli", "distiller"),
    ("sweep", "planning", "publishing"),
    ("pipeline", "console", "doctor", "preflight"),
    ("student", "probing", "exporting"),
    ("arms", "teacher", "report", "differing"),
    ("datasets", "comparing", "project", "status", "tracking"),
    ("events", "jobs", "checkpoints", "finding", "config_schema"),
    ("config", "reporting", "ranking"),
    ("proof",),
    ("fidelity", "budget", "gate", "stores"),
    ("capture", "training", "evaluation", "sizes"),
    ("batching", "cache", "adapters", "weighting", "alignment"),
    ("manifest", "examples"),
    ("losses", "models", "vocabulary", "shards", "layers", "starter"),
    ("prompts", "targets", "validation", "pocket", "memory", "locks"),
    ("json_lines", "yaml_file", "files", "backend"),
    ("options", "suggest", "errors", "blas", "metal", "stopping", "layout"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

BAD_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "handler", "misc", "tools"}


def relative(path: Path) -> str:
    """A file as messages name it."""
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """Module name without the leading "true_kd.": "models.opening"; a package by its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def room(module: str) -> str:
    """The file or package of the ground plan that a module belongs to."""
    return module.partition(".")[0]


MODULES = {name_of(path): path for path in SOURCES}
ROOMS = sorted({room(module) for module in MODULES} - {"__init__"})


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Everything inside `if TYPE_CHECKING:`."""
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {inner for node in guarded for inner in ast.walk(node)}


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of all that a file imports, lazy imports included: "mlx.core", "true_kd.models.opening"."""
    tree = parsed(path)
    skipped = for_types_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, as `MODULES` names them."""
    found = set()
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head != "true_kd":
            continue
        module = rest if rest in MODULES else rest.rpartition(".")[0]
        if module:
            found.add(module)
    return found


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, methods and inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """All calls of a file, with the dotted name of what is called."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# Ground plan.


def test_every_module_has_a_floor() -> None:
    assert set(ROOMS) == set(FLOOR)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_point_down(name: str) -> None:
    upward = [
        f"{relative(path)} imports true_kd.{target}"
        for module, path in MODULES.items()
        if room(module) == name
        for target in own_imports(path)
        if room(target) != name and FLOOR[room(target)] <= FLOOR[name]
    ]
    assert upward == []


def test_no_module_imports_itself_in_the_end() -> None:
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done:
            return
        for target in sorted(own_imports(MODULES[module]) & set(MODULES)):
            # A package's __init__ gathers the names of its own files.
            if target != module and not module.startswith(f"{target}."):
                walk(target, (*above, module))
        done.add(module)

    for module in MODULES:
        if module != "__init__":
            walk(module, ())


def test_the_package_imports_blas_before_all_else() -> None:
    top = [node for node in parsed(PACKAGE / "__init__.py").body if isinstance(node, (ast.Import, ast.ImportFrom))]
    own = [node for node in top if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("true_kd")]
    assert [alias.name for node in own for alias in node.names] == ["blas"]
    assert not any("mlx" in ast.unparse(node) for node in top)


@pytest.mark.parametrize("library", ["mlx_lm", "transformers", "huggingface_hub"])
def test_only_the_seam_imports_what_changes_often(library: str) -> None:
    users = {room(name) for name, path in MODULES.items() if any(room(found) == library for found in imports(path))}
    # Models come from the hub through the one, adapters go there through the other.
    assert users <= ({"models", "publishing"} if library == "huggingface_hub" else {"models"})


def test_mlx_lm_is_imported_when_it_is_needed_and_not_before() -> None:
    eager = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in parsed(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "mlx_lm" in ast.unparse(node)
    ]
    assert eager == []


def test_only_the_face_knows_typer_and_rich() -> None:
    for name, path in MODULES.items():
        if room(name) not in ("cli", "console"):
            assert not {room(found) for found in imports(path)} & {"typer", "rich"}, name


# Manners.


def is_a_report_of_failure(name: str, call: ast.Call) -> bool:
    """Whether it is the view that prints, and to stderr, which no rich console of stdout reaches."""
    files = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"]
    return room(name) == "console" and files == ["sys.stderr"]


def test_only_the_face_prints_and_exits() -> None:
    loud = [
        f"{relative(path)}:{node.lineno} {called}"
        for name, path in MODULES.items()
        if room(name) not in ("__main__", "cli")
        for called, node in calls(path)
        if called in ("print", "input", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write")
        if not is_a_report_of_failure(name, node)
        # Where a process ends at once: at a second signal, and with the run that it works for.
        if (name, called) not in (("stopping", "os._exit"), ("pipeline.child", "os._exit"))
    ]
    assert loud == []


def broad_excepts(path: Path) -> list[str]:
    """Places that catch everything without saying why beside a `noqa: BLE001`."""
    lines = path.read_text().splitlines()
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"Exception"}
            reason = re.search(r"# noqa: BLE001\W+\w+ \w+", lines[node.lineno - 1])
            if caught & {"Exception", "BaseException"} and not reason:
                found.append(f"{relative(path)}:{node.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_whoever_catches_everything_says_why(path: Path) -> None:
    assert broad_excepts(path) == []


def test_no_function_takes_any_keyword() -> None:
    soup = {
        f"{name}.{node.name}" for name, path in MODULES.items() for node in functions(parsed(path)) if node.args.kwarg
    }
    # These pass on whatever mlx-lm's models say to each other, and its server to a template.
    assert soup == {"config.__init__", "models.heads.__call__", "models.templates.apply"}


def test_no_default_is_changed_by_a_call() -> None:
    mutable = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in functions(parsed(path))
        for default in (*node.args.defaults, *node.args.kw_defaults)
        if isinstance(default, (ast.List, ast.Dict, ast.Set))
    ]
    assert mutable == []


# Safety.


def test_code_of_a_model_is_never_trusted() -> None:
    for path in (*SOURCES, *SCRIPTS):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", f"{relative(path)}:{node.lineno}"
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                        assert ast.unparse(value) == "False", f"{relative(path)}:{node.lineno}"


def test_nothing_is_read_that_could_run() -> None:
    modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "torch", "joblib"}
    unsafe = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    for path in SOURCES:
        assert not {room(name) for name in imports(path)} & modules, relative(path)
        for called, node in calls(path):
            assert called not in unsafe, f"{relative(path)}:{node.lineno} {called}"
            assert "pickle" not in called, f"{relative(path)}:{node.lineno} {called}"
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert flags.get("allow_pickle", "False") == "False", f"{relative(path)}:{node.lineno}"
            assert flags.get("shell", "False") == "False", f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, *TEXTS], ids=relative)
def test_no_shipped_file_names_a_place_on_one_machine(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(r"(?<![\w.~/-])/(work|tmp|root|Users|home)/", line), f"{relative(path)}:{number}: {line}"


def test_no_prompt_names_the_place_it_was_written_in() -> None:
    for path in (ROOT / "prompts").rglob("*.jsonl"):
        assert "/work/" not in path.read_text(encoding="utf-8"), relative(path)


# Words.


def test_every_public_thing_says_what_it_is() -> None:
    silent = []
    for name, path in MODULES.items():
        tree = parsed(path)
        if not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            inside = node.body if isinstance(node, ast.ClassDef) else []
            for item in (node, *inside):
                public = isinstance(item, (ast.ClassDef, ast.FunctionDef)) and not item.name.startswith("_")
                if public and not ast.get_docstring(item):
                    silent.append(f"{relative(path)}:{item.lineno} {item.name}")
    assert silent == []


def test_every_option_says_what_it_means() -> None:
    from true_kd.config import RunConfig
    from true_kd.options import Options

    def options(model: type[Options]) -> Iterator[tuple[type[Options], str, str | None]]:
        for name, field in model.model_fields.items():
            yield model, name, field.description
            if isinstance(field.annotation, type) and issubclass(field.annotation, Options):
                yield from options(field.annotation)

    assert [f"{model.__name__}.{name}" for model, name, text in options(RunConfig) if not text] == []


def test_files_stay_short() -> None:
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in (*SOURCES, *SCRIPTS)}
    assert {name: lines for name, lines in long.items() if lines > 520} == {}


@pytest.mark.parametrize("paths", [[*SOURCES, *SCRIPTS, *TEXTS[1:]], TESTS], ids=["shipped", "tests"])
def test_lines_stay_short(paths: list[Path]) -> None:
    long = [
        f"{relative(path)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def test_no_module_is_named_after_nothing() -> None:
    assert [
        relative(path) for path in (*SOURCES, *SCRIPTS, *TESTS) if path.stem.removeprefix("test_") in BAD_NAMES
    ] == []


def test_no_comment_is_a_banner() -> None:
    banners = [
        f"{relative(path)}:{number}"
        for path in (*SOURCES, *SCRIPTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"#.*(-{4,}|={4,}|#{4,}|\*{4,})", line)
    ]
    assert banners == []


def test_comments_leave_history_and_plans_to_git() -> None:
    words = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK|used to|no longer|previously|legacy|deprecated)\b")
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in (*SOURCES, *SCRIPTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def test_each_test_file_is_named_after_what_it_tests() -> None:
    files = {name.rpartition(".")[2] for name in MODULES}
    others = {
        "packaging",
        "house",
        "prompt_data",
        "pocket_tasks",
        "readme",
        "benchmarks",
        "troubleshooting",
        "terminal",
        "docs",
        "method",
        "memory_page",
        "worked_examples",
    }
    subjects = set(ROOMS) | files | others | {"hostile", "bad_input", "damage", "chaos", "numbers"}
    strangers = [path.name for path in TESTS if path.name.startswith("test_") and path.stem[5:] not in subjects]
    assert strangers == []
