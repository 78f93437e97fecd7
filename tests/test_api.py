"""Conventions of the public surface: imports point down, defaults are keyword-only, docs run."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import capsjax
import capsjax.models
import capsjax.nn

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = {name: value for name, value in vars(capsjax).items() if inspect.isfunction(value)}
MODULES = {
    f"{module.__name__}.{name}": value
    for module in (capsjax.nn, capsjax.models)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, nnx.Module)
}
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("capsjax", "kernels", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if "capsjax/kernels" not in path.as_posix()
)


def test_the_public_names_are_these():
    assert sorted(PUBLIC) == [
        "count_interests",
        "coupling_entropy",
        "dynamic_routing",
        "dynamic_routing_from_votes",
        "em_routing",
        "inverted_attention_routing",
        "inverted_attention_step",
        "kmeans_routing",
        "label_aware_attention",
        "lengths",
        "margin_loss",
        "multi_interests",
        "reconstruction_loss",
        "routing_couplings",
        "self_attention_routing",
        "self_attentive_interests",
        "self_routing",
        "squash",
        "strided_conv",
        "variational_bayes_routing",
    ]
    assert len(MODULES) == 12


@pytest.mark.parametrize("name", [*PUBLIC, *MODULES])
def test_whatever_has_a_default_is_keyword_only(name):
    function = PUBLIC.get(name) or MODULES[name].__init__
    for parameter in inspect.signature(function).parameters.values():
        is_shape = name.endswith("CapsNet") and parameter.name in ("image_shape", "num_classes")
        if parameter.default is not parameter.empty and not is_shape:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_document_every_argument_the_result_and_an_example(name):
    text = inspect.getdoc(PUBLIC[name])
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert f"  {parameter}: " in text, parameter
    for section in ("Args:", "Returns:", "Example:"):
        assert section in text, section


@pytest.mark.parametrize("name", [*PUBLIC, *MODULES])
def test_examples_run_as_written(name):
    value = PUBLIC.get(name) or MODULES[name]
    # As after imports of jax, jax.numpy, nnx, and a * import of each capsjax module.
    public = {**vars(capsjax.nn), **PUBLIC, **vars(capsjax.models)}
    names = {name: value for name, value in public.items() if not inspect.ismodule(value)}
    names |= {"jax": jax, "jnp": jnp, "nnx": nnx}
    tests = list(doctest.DocTestFinder(recurse=False).find(value, name, globs=names))
    assert [len(test.examples) > 0 for test in tests] == [True]
    results = doctest.DocTestRunner(verbose=False).run(tests[0])
    assert results.failed == 0


def imported_by(path):
    """Every name that a file imports, with the module in front."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_within(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    allowed = {
        "kernels": {"jax", "numpy", "capsjax.kernels"},
        "capsjax": {"jax", "numpy", "capsjax"},
    }.get(path.parts[0])
    if path.parts[1] in ("nn", "models"):
        allowed = allowed | {"flax", "safetensors"}
    for name in imported_by(path):
        top = name.split(".")[0]
        assert top not in ("tests", "kernels"), f"{path} imports {name}"
        if allowed is not None and top not in sys.stdlib_module_names:
            assert is_within(name, allowed), f"{path}: {name}"


ROUTINGS = [path for path in SOURCES if path.parts[:2] == ("capsjax", "routing")]


@pytest.mark.parametrize("path", ROUTINGS, ids=str)
def test_no_routing_algorithm_imports_another(path):
    assert pathlib.Path("capsjax/routing/dynamic.py") in ROUTINGS
    shared = {"capsjax.routing._arguments"}
    if path.stem != "_arguments":
        assert "capsjax.routing._arguments" in imported_by(path) or path.stem == "__init__"
    for name in imported_by(path):
        assert is_within(name, shared) or not is_within(name, {"capsjax.routing"}), name
        # The package itself has the algorithms as its public names.
        assert name != "capsjax", path
        assert name.removeprefix("capsjax.") not in PUBLIC, name


# How `capsjax.shapes` declares a letter: "- I: input capsules (children)".
DECLARATION = re.compile(r"^\s*[-*]?\s*`?([A-Z](?:, [A-Z])*)`?\s*[:=-]\s+[a-z]", re.MULTILINE)


def declared_in(path):
    """The shape letters that the docstring of a module declares."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    return [letter for found in DECLARATION.findall(text) for letter in found.split(", ")]


def test_the_shape_letters_are_declared_once():
    declared = {str(path): declared_in(path) for path in SOURCES if path.parts[0] != "experiments"}
    letters = declared.pop("capsjax/shapes.py")
    assert sorted(letters) == sorted(set(letters))
    assert set("BIJPDT") <= set(letters)
    assert {path: found for path, found in declared.items() if found} == {}


def test_every_module_has_a_docstring():
    names = [info.name for info in pkgutil.walk_packages(capsjax.__path__, "capsjax.")]
    assert "capsjax.kernels.dispatch" in names
    for name in names:
        assert importlib.import_module(name).__doc__, name
