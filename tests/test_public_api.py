"""What `import pae_jax as pae` offers, and that every public name explains itself."""

import ast
import importlib
import inspect
import pkgutil
import re

import pytest

import pae_jax as pae

NAMES = """
linen nnx layout init from_variables pack fit prune freeze drop predict features evaluate masks trainable free_fraction
check verify save load read_metadata report transfer width_for expand widen_maps learn learn_all baseline
as_flax task_variables gate commit gradient_scores nearest_task clear_caches
write_bundle read_bundle certificate export slim
State TaskState Growth History Net CubicSchedule Picking Plateau WidenMaps TrainState Best Devices
Task Metric MeanOf Recipe Run Outcome Status Stream Server SlimNet Inference TaskProgram Certificate Saving
PaeError ArgumentError CapacityError CheckpointError DataError DivergedError ForgettingError NotPreservableError
PhaseError ProcessError StructureError TrainingInterrupted UnknownTaskError
"""
MODULES = {"data", "faces", "metrics", "models", "recipes", "sizes"}

public = {name for name in vars(pae) if not name.startswith("_") and not inspect.ismodule(getattr(pae, name))}


def test_the_public_names_are_the_documented_ones():
    names = set(NAMES.split())
    assert names - public == set()
    assert public - names == set()
    assert set(dir(pae)) >= MODULES
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pae.__version__)


def test_all_lists_every_public_name_once_in_order():
    assert pae.__all__ == sorted(pae.__all__)
    assert len(pae.__all__) == len(set(pae.__all__))
    assert set(pae.__all__) == public | MODULES
    star = {}
    exec("from pae_jax import *", star)
    assert star.keys() - {"__builtins__"} == set(pae.__all__)


def test_a_public_name_is_imported_in_the_one_page_under_the_name_it_has_at_home():
    tree = ast.parse(inspect.getsource(pae))
    imported = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    imported = [alias for alias in imported if alias.name != "__version__"]
    assert all(alias.asname is None for alias in imported)
    assert {alias.name for alias in imported} == public | MODULES
    for name in public:
        assert getattr(pae, name).__name__ == name


def test_no_module_has_the_name_of_a_public_function():
    """A module beside a function of its name in the package would take its place when it is imported."""
    modules = {info.name for info in pkgutil.walk_packages(pae.__path__, "pae_jax.")}
    functions = {name for name in public if inspect.isfunction(getattr(pae, name))}
    top = {name.removeprefix("pae_jax.") for name in modules}
    assert functions & top == set()
    assert "prune" in functions
    assert {"core.pruning", "nets.linen", "caching"} <= top
    for name in sorted(modules):
        importlib.import_module(name)
    assert all(inspect.isfunction(getattr(pae, name)) for name in functions)


def sections(thing):
    return set(
        re.findall(r"^(Args|Attributes|Returns|Raises|Example|Source)s?:", inspect.getdoc(thing) or "", re.MULTILINE)
    )


@pytest.mark.parametrize("name", sorted(name for name in public if inspect.isfunction(getattr(pae, name))))
def test_a_public_function_documents_arguments_result_and_an_example(name):
    function = getattr(pae, name)
    found = sections(function)
    doc = inspect.getdoc(function)
    returns = inspect.signature(function).return_annotation not in (None, "None")
    assert "Example" in found
    if inspect.signature(function).parameters:
        assert "Args" in found
    if returns:
        assert "Returns" in found
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^  \*{{0,2}}{argument}: ", doc, re.MULTILINE), f"{argument} is not documented"
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", sorted(name for name in public if inspect.isclass(getattr(pae, name))))
def test_a_public_class_documents_its_fields(name):
    kind = getattr(pae, name)
    doc = inspect.getdoc(kind)
    assert doc
    assert doc.splitlines()[0].endswith(".")
    fields = [f for f in getattr(kind, "__dataclass_fields__", {}) if not f.startswith("_")]
    for field in fields:
        assert re.search(rf"^  (\w+, )*{field}(, \w+)*: ", doc, re.MULTILINE), f"{field} is not documented"


def test_every_argument_that_draws_random_numbers_is_an_explicit_key():
    for name in ("init", "pack", "fit"):
        parameter = inspect.signature(getattr(pae, name)).parameters["key"]
        assert parameter.default is inspect.Parameter.empty


def test_every_public_method_of_a_train_state_documents_its_arguments():
    for name in ("create", "apply_fn", "apply_gradients", "prune", "commit"):
        method = getattr(pae.TrainState, name)
        doc = inspect.getdoc(method)
        for argument in set(inspect.signature(method).parameters) - {"self"}:
            assert re.search(rf"^  {argument}: ", doc, re.MULTILINE), f"{argument} of {name} is not documented"
