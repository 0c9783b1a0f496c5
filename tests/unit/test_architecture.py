"""The rules of the design that a reader of the imports can check: who may know whom, and what never stands in code."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mllm_demo.models.catalog import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mllm_demo"
MAX_LINES = 400
# Packages that import torch themselves.
TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "torchvision"}
PUBLIC_FACES = {f"{PACKAGE}", f"{PACKAGE}.moe_lora", f"{PACKAGE}.models.bundled"}
# Where the names of models are data: what can be chosen, and what the bundled model is made of.
_NAMING = ("models.catalog", "models.bundled", "models.moe_llava", "training")
NAMES_ALLOWED = tuple(f"{PACKAGE}.{name}" for name in _NAMING)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(path): path for path in [*sorted((ROOT / PACKAGE).rglob("*.py")), ROOT / "app.py"]}
MODULES = sorted(FILES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The second part of the name: chat, models, ui, ... or the module itself outside the package."""
    return module.split(".")[1] if "." in module else module


@cache
def imported(module: str) -> frozenset[str]:
    """Full names of everything that `module` imports; of ours only names of modules."""
    is_package = FILES[module].name == "__init__.py"
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in FILES)
    ours = {name for name in names if name.split(".")[0] in (PACKAGE, "app")}
    assert ours <= set(FILES), f"{module} imports {ours - set(FILES)}, which does not exist"
    return frozenset(names)


@cache
def closure(module: str) -> frozenset[str]:
    """Everything that importing `module` imports, through our modules and the packages above them."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in FILES:
            waiting.extend(imported(name))
            parent = name.rpartition(".")[0]
            if parent in FILES:
                waiting.append(parent)
    return frozenset(seen)


def outside(module: str, *, transitively: bool = False) -> set[str]:
    """Top-level names of the packages of others that `module` imports."""
    return {name.split(".")[0] for name in (closure(module) if transitively else imported(module))}


def functions(module: str):
    return (n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def texts(module: str):
    """String constants that are not docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


TORCH_FREE = [
    name
    for name in MODULES
    if name in (f"{PACKAGE}.chat.messages", f"{PACKAGE}.chat.events", f"{PACKAGE}.chat.images")
    or name == f"{PACKAGE}.chat.grounding"
    or name in (f"{PACKAGE}.routing.trace", f"{PACKAGE}.routing.stats")
    or room(name) in ("figures", "ui")
]


# Who may know whom


@pytest.mark.parametrize("module", MODULES)
def test_gradio_stays_in_the_page_and_plotly_in_the_figures(module):
    if room(module) not in ("ui", "app"):
        assert "gradio" not in outside(module)
    if room(module) != "figures":
        assert "plotly" not in outside(module)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_draws_needs_no_torch_by_its_imports(module):
    assert not TORCH & outside(module, transitively=True)
    assert not any(name.startswith("safetensors.torch") for name in closure(module))


def test_what_draws_needs_no_torch_when_it_is_really_imported():
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}: importlib.import_module(name)\n"
        f"print(sorted({sorted(TORCH)!r} & sys.modules.keys()))"
    ).replace(f"{sorted(TORCH)!r} &", f"set({sorted(TORCH)!r}) &")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "ui"])
def test_the_page_is_handed_its_engine(module):
    known = {name for name in closure(module) if name.startswith(f"{PACKAGE}.")}
    assert f"{PACKAGE}.chat.engine" not in known
    assert not any(room(name) in ("models", "moe_lora", "training") for name in known)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "moe_lora"])
def test_moe_lora_can_be_lifted_out(module):
    for name in imported(module):
        if name.split(".")[0] == PACKAGE:
            assert room(name) == "moe_lora", f"{module} knows {name}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_the_app(module):
    assert "app" not in imported(module)


def test_the_app_and_the_shell_command_never_import_training():
    for module in ("app", f"{PACKAGE}.ask"):
        assert not any(name.startswith(f"{PACKAGE}.training") for name in closure(module))


# A command that people start by the name of the room whose question it answers. It wires rooms, as `app.py` does.
COMMANDS = (f"{PACKAGE}.routing.drift",)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("figures", "routing")])
def test_a_trace_and_its_pictures_know_neither_models_nor_page(module):
    known = {room(name) for name in closure(module) if name.startswith(f"{PACKAGE}.")}
    assert not known & ({"ui", "training"} if module in COMMANDS else {"ui", "models", "training"})


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_imports_a_command_that_wires_rooms(command):
    assert 'if __name__ == "__main__"' in FILES[command].read_text()
    assert not [module for module in MODULES if command in imported(module)]


# What never stands in code


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_by_saying_what_it_does(module):
    if FILES[module].name == "__init__.py" and not FILES[module].read_text().strip():
        return
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", [name for name in MODULES if FILES[name].name == "__init__.py"])
def test_an_init_is_empty_unless_it_is_a_public_face(module):
    if module not in PUBLIC_FACES:
        assert not FILES[module].read_text().strip()


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module):
    for function in functions(module):
        inner = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not inner, f"{module}, line {inner[0].lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_no_model_is_named_outside_the_catalogue(module):
    if module.startswith(NAMES_ALLOWED):
        return
    families = {re.match(r"(MoE-)?[A-Za-z]+[\d.]*", entry.title)[0] for entry in CATALOGUE[1:]}
    families |= {"SmolLM", "Llava-", "LLaVA"}
    hub_names = {entry.hub_id.split("/")[0] + "/" for entry in CATALOGUE if entry.hub_id}
    for node in texts(module):
        if node.value == "moe-llava-noise":  # a flag, which says whose noise it is
            continue
        for name in families | hub_names:
            assert name.lower() not in node.value.lower(), f"{module}, line {node.lineno}: {node.value!r}"


@pytest.mark.parametrize("module", MODULES)
def test_no_patch_count_or_grid_is_written_into_code(module):
    """576 = 24 x 24 is CLIP at 336 pixels, 49 = 7 x 7 ours, 729 = 27 x 27 SigLIP, 1024 = 32 x 32 tiles."""
    if module.startswith(NAMES_ALLOWED):
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            assert node.value not in (49, 576, 729), f"{module}, line {node.lineno}"
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            sides = [side.value for side in node.elts if isinstance(side, ast.Constant)]
            assert sides not in ([24, 24], [27, 27], [7, 7], [16, 16]), f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_no_token_id_or_layer_count_is_written_into_code(module):
    """A name that ends in token_id or num_layers is read from a config or processor, never set to a number."""
    if module.startswith(NAMES_ALLOWED):
        return
    counted = re.compile(r"(token_id|token_index|num_(hidden_)?layers|n_layers|image_seq_len(gth)?)$", re.IGNORECASE)
    for node in ast.walk(tree(module)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [getattr(target, "id", getattr(target, "attr", "")) for target in targets]
        if isinstance(node, ast.keyword):
            names = [node.arg or ""]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and type(value.value) is int and value.value > 0:
            assert not any(counted.search(name) for name in names), f"{module}, line {value.lineno}"


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}


def _is_mutable(value: ast.expr | None) -> bool:
    made = isinstance(value, ast.Call) and getattr(value.func, "id", getattr(value.func, "attr", ""))
    return isinstance(value, MUTABLE) or made in ("list", "dict", "set", "defaultdict", "deque", "Queue", "OrderedDict")


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(f"{PACKAGE}.training")])
def test_no_module_holds_state_that_two_users_could_share(module):
    constants = set()
    for node in tree(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_mutable(node.value):
            names = {target.id for target in targets if isinstance(target, ast.Name)} - {"__all__"}
            assert all(name.isupper() for name in names), f"{module}, line {node.lineno}: {names} can be changed"
            constants |= names
    for node in ast.walk(tree(module)):
        assert not isinstance(node, ast.Global), f"{module}, line {node.lineno}: global"
        changed = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = node.func.value
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        assert getattr(changed, "id", None) not in constants, f"{module}, line {getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("module", sorted(name for name in closure("app") if name in FILES))
def test_a_hook_is_kept_so_that_it_can_be_removed(module):
    calls = [
        node
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and re.fullmatch(r"register_\w*hook", getattr(node.func, "attr", ""))
    ]
    dropped = {id(node.value) for node in ast.walk(tree(module)) if isinstance(node, ast.Expr)}
    assert not any(id(call) in dropped for call in calls), f"{module} registers a hook that nobody can remove"
    if calls:
        removed = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Attribute) and n.attr == "remove"]
        assert removed, f"{module} registers hooks and removes none"


@pytest.mark.parametrize("module", MODULES)
def test_no_pickle_and_no_remote_code(module):
    assert not outside(module) & {"pickle", "dill", "cloudpickle", "joblib"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{module}, line {node.lineno}"


def test_the_rules_see_the_whole_program():
    assert {"app", f"{PACKAGE}.chat.engine", f"{PACKAGE}.models.loading"} <= set(MODULES)
    assert f"{PACKAGE}.models.loading" in closure("app") and "torch" in closure("app")
    assert len(TORCH_FREE) > 5
