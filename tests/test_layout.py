"""The shape of the house: who may import whom, how large things may grow, what stands at the top."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "core": 1,
    "data": 2,
    "attention": 3,
    "models": 4,
    "tasks": 5,
    "decode": 5,
    "interop": 5,
    "report": 5,
    "compress": 6,
    "train": 7,
}
TOP_LEVEL = {
    "README.md", "requirements.txt", "LICENSE", "pyproject.toml", "launch.py", "fastformer", "configs",
    "experiments", "tests", "docs", ".ci", ".gitignore",
}  # fmt: skip
# What sets of flags and files a config may read: nothing of ours.
CONFIG_IMPORTS = {"ml_collections", "configs", "__future__"}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_BASE, MAX_LAUNCH = 400, 60, 10, 180, 160

LIBRARY = sorted(ROOT.glob("fastformer/**/*.py"))
CONFIGS = sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("experiments/*/*.py")])
LAUNCH = [path for path in [ROOT / "launch.py"] if path.exists()]
SHIPPED = [*LIBRARY, *CONFIGS, *LAUNCH]
CODE = [*SHIPPED, *sorted(ROOT.glob("tests/**/*.py"))]


def parametrised(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imports(path):
    """Return the dotted names that a file imports, wherever it does."""
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def functions(path):
    return [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def package(dotted):
    """Return the package of fastformer that a dotted name lies in, or None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "fastformer" and len(parts) > 1 else None


def upward(own, imported):
    """Return whether package ``own`` may not import package ``imported``."""
    return own != imported and FLOORS[imported] >= FLOORS[own]


@parametrised([path for path in LIBRARY if path.parent != ROOT / "fastformer"])
def test_an_import_never_goes_up(path):
    own = path.relative_to(ROOT / "fastformer").parts[0]
    assert own in FLOORS, f"fastformer/{own} stands on no floor of DESIGN.md"
    for name in imports(path):
        found = package(name)
        assert not (found and upward(own, found)), f"{own} (floor {FLOORS[own]}) imports {name}"
        assert name.split(".")[0] not in ("configs", "experiments", "launch", "tests"), name


def test_the_rule_about_imports_can_fail():
    assert upward("data", "models") and upward("report", "tasks") and upward("core", "data")
    assert not upward("models", "attention") and not upward("train", "report") and not upward("core", "core")


@parametrised([path for path in LIBRARY if path.parent == ROOT / "fastformer"])
def test_the_package_itself_imports_nothing(path):
    assert path.name == "__init__.py" and not imports(path)


@parametrised(CONFIGS)
def test_a_config_imports_no_code(path):
    assert {name.split(".")[0] for name in imports(path)} <= CONFIG_IMPORTS


@parametrised(CODE)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for function in functions(path):
        where = f"{path.name}: {function.name}"
        # base.get_config is one line a key, and the file has a bound of its own.
        if path != ROOT / "configs/base.py":
            assert function.end_lineno - function.lineno + 1 <= MAX_FUNCTION, f"{where} is too long"
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        assert count <= MAX_PARAMETERS, f"{where} takes {count} parameters"


def test_the_reference_page_and_the_launcher_stay_short():
    assert len((ROOT / "configs/base.py").read_text().splitlines()) <= MAX_BASE
    for path in LAUNCH:
        assert len(path.read_text().splitlines()) <= MAX_LAUNCH


@parametrised([path for path in LIBRARY if {"attention", "models"} & set(path.parts)])
def test_no_keywords_are_tunnelled_through_layers(path):
    for function in functions(path):
        assert function.args.kwarg is None, f"{path.name}: {function.name} takes **{function.args.kwarg.arg}"


@parametrised([path for path in LIBRARY if path.name != "__init__.py" or path.read_text().strip()])
def test_what_is_public_has_a_docstring(path):
    module = tree(path)
    assert ast.get_docstring(module), f"{path.name} has no docstring"
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def variant_comparisons(module, names):
    """Return the comparisons of something to the name of a variant: a ladder where a table should be."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        else:
            continue
        constants = {
            c.value for operand in operands for c in ast.walk(operand) if isinstance(c, ast.Constant)
        }
        found += [
            (node.lineno if hasattr(node, "lineno") else 0, name) for name in names if name in constants
        ]
    return found


@parametrised([*LIBRARY, *LAUNCH])
def test_no_variant_is_told_apart_by_its_name(path):
    from fastformer.attention import VARIANTS

    assert not variant_comparisons(tree(path), VARIANTS)


@pytest.mark.parametrize("code", ['x == "linear"', 'x in ("local", "b")', 'match x:\n  case "linear": pass'])
def test_the_rule_about_variants_can_fail(code):
    assert variant_comparisons(ast.parse(code), ("linear", "local"))
    assert not variant_comparisons(ast.parse('x = "linear"; f("local")'), ("linear", "local"))


@parametrised(CODE)
def test_no_path_of_a_machine_is_written_down(path):
    machine = re.compile(r"""["'\s=(](/(?:home|root|work|tmp|Users|mnt|opt|data)/[\w.-]+)""")
    assert not machine.findall(path.read_text())


def test_only_these_stand_at_the_top():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert top <= TOP_LEVEL
