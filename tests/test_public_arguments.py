"""What is no network, no network description, no recipe or no task is refused by the argument's name, at the door."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import pae_jax as pae


def functions(argument):
    """Return `{name: function}` of the public functions that take an argument of this name."""
    found = {name: getattr(pae, name) for name in pae.__all__} | {"TrainState.create": pae.TrainState.create}
    for place, home in ((pae.sizes, "pae_jax.reports"), (pae.faces, "pae_jax.faces")):
        public = {name: value for name, value in vars(place).items() if name[0] != "_"}
        found |= {name: value for name, value in public.items() if getattr(value, "__module__", "").startswith(home)}
    functions = {name: f for name, f in found.items() if inspect.isroutine(f) or f is pae.Server}
    # Without the checks of the tests themselves, which come before those of a function.
    plain = {name: inspect.unwrap(function) for name, function in functions.items()}
    return {name: f for name, f in plain.items() if argument in inspect.signature(f).parameters}


def call(function, **known):
    """Call a function with what is known of its arguments, and None for the others that it needs."""
    parameters = inspect.signature(function).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    given = {name: known.get(name) for name in needed} | {name: v for name, v in known.items() if name in parameters}
    return function(**given)


@pytest.mark.parametrize("name", sorted(functions("state")))
def test_what_is_no_state_is_refused_by_name(name, net, packed, tmp_path):
    outcome = pae.Stream(packed, (), None)
    slips = [((packed, None), "state, history = pae.fit"), (outcome, "pass its .state"), (net, "net is passed before")]
    for wrong, hint in [*slips, (None, "pae.init")]:
        with pytest.raises(pae.ArgumentError, match=f"^state must be a pae_jax State, found .*{hint}"):
            call(functions("state")[name], path=tmp_path / "new", net=net, task="a", state=wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", sorted(functions("net")))
def test_what_is_no_net_is_refused_by_name(name, packed, vector_module, tmp_path):
    slips = [(vector_module, "the class Vector"), (vector_module(), "a value of type Vector")]
    for wrong, found in [*slips, *([] if name == "check" else [(None, "None")])]:
        with pytest.raises(pae.ArgumentError, match=f"^net must be .* pae.linen.*, found {found}$"):
            known = {"path": tmp_path / "new", "task": "a", "state": packed, "recipe": pae.recipes.finetune()}
            call(functions("net")[name], net=wrong, **known)
    assert not (tmp_path / "new").exists()


VALUES = ("Server", "check", "expand", "export", "save", "slim", "verify", "write_bundle")


@pytest.mark.parametrize("name", VALUES)
def test_what_looks_at_values_is_refused_inside_jit(name, net, frozen, tmp_path):
    def traced(state):
        known = {"path": tmp_path / "new", "net": net, "task": "a", "state": state, "width": 2.0}
        return call(functions("state")[name], **known, key=jax.random.key(0))

    with pytest.raises(pae.ArgumentError, match=f"^{name} looks at values, .*; call it outside jit"):
        jax.eval_shape(traced, frozen)
    assert not (tmp_path / "new").exists()


def test_slips_in_what_is_learned_are_refused_by_name(net, empty, data, tmp_path):
    task, key, recipe = pae.Task("a", 2, data, data), jax.random.key(0), pae.recipes.finetune()
    recipes = [("recipe", {"recipe": pae.recipes.pae}, "the function pae"), ("recipe", {"recipe": None}, "None")]
    other = [("run", {"run": str(tmp_path / "run")}, "a value of type str")]
    for name, wrong, found in [*recipes, *other, ("task", {"task": data}, "a value of type tuple")]:
        for learn in (pae.learn, pae.baseline):
            given = {"net": net, "state": empty, "task": task, "recipe": recipe, "key": key} | wrong
            with pytest.raises(pae.ArgumentError, match=f"^{name} must be of type .*, found {found}$"):
                call(learn, **given)
    for name, wrong, found in [*recipes, *other, (r"tasks\[1\]", {"tasks": [task, data]}, "a value of type tuple")]:
        given = {"tasks": [task], "recipe": recipe, "key": key} | wrong
        with pytest.raises(pae.ArgumentError, match=f"^{name} must be of type .*, found {found}$"):
            pae.learn_all(net, empty, **given)
    with pytest.raises(pae.ArgumentError, match=r"tasks must be a sequence.*dict"):
        pae.learn_all(net, empty, {"a": task}, recipe, key=key)
    assert not (tmp_path / "run").exists()


def test_slips_in_a_recipe_are_refused_by_name(adam):
    phase, ladder = pae.recipes.Phase(1, pae.recipes.Rate(0.1)), pae.recipes.Ladder
    with pytest.raises(pae.ArgumentError, match="train must be of type Phase, found a value of type Gradient"):
        pae.Recipe("a", train=adam)
    with pytest.raises(pae.ArgumentError, match="ladder must be of type Ladder, found a value of type Phase"):
        pae.Recipe("a", train=phase, ladder=phase)
    with pytest.raises(pae.ArgumentError, match=r"rungs must be a tuple of fractions.*float"):
        ladder(0.5, phase)
    with pytest.raises(pae.ArgumentError, match="phase must be of type Phase, found a value of type Rate"):
        ladder((0.5,), phase.rate)
    with pytest.raises(pae.ArgumentError, match=r"rungs must be a number in .* found '0.5'"):
        ladder(("0.5",), phase)
    with pytest.raises(pae.ArgumentError, match="ramp must be a finite number, found 'x'"):
        ladder((0.5,), phase, ramp="x")


def test_functions_that_cannot_be_called_as_fit_does_are_refused_by_name(quick_fit, packed, data):
    with pytest.raises(pae.DataError, match="data: the function <lambda> must take the number of the epoch"):
        quick_fit(packed, "a", lambda: iter([data]))
    for augment in (lambda x: x, 3, lambda key, x, y, more: (x, y)):
        with pytest.raises(pae.ArgumentError, match=r"augment must be \(key, x\) -> x or \(key, x, y\) -> \(x, y\)"):
            quick_fit(packed, "a", augment=augment)
    with pytest.raises(pae.ArgumentError, match=r"resume must be the history that fit returned, found .* str"):
        quick_fit(packed, "a", resume="history")


def test_metrics_in_a_list_are_refused_by_name(net, packed, data):
    with pytest.raises(pae.ArgumentError, match=r"metrics must be {name: .*found a value of type list"):
        pae.evaluate(net, packed, "a", data, metrics=["accuracy"])


def test_what_is_no_dict_or_no_collection_of_names_is_refused_by_the_arguments_name(net, frozen, data, tmp_path):
    task, key, recipe = pae.Task("b", 2, data, data), jax.random.key(0), pae.recipes.finetune()
    pae.save(tmp_path / "stage", frozen)
    pae.write_bundle(tmp_path / "bundle", net, frozen)
    calls = {
        "goals": lambda wrong: pae.learn_all(net, frozen, [task], recipe, key=key, goals=wrong),
        "heads": lambda wrong: pae.load(net, tmp_path / "stage", heads=wrong),
        "heads ": lambda wrong: pae.read_bundle(net, tmp_path / "bundle", heads=wrong),
        "data": lambda wrong: pae.write_bundle(tmp_path / "new", net, frozen, data=wrong),
        "data ": lambda wrong: pae.Server(net, frozen).task_inference_accuracy(wrong),
        "learned": lambda wrong: pae.transfer(frozen, learned=wrong),
        "alone": lambda wrong: pae.transfer(frozen, alone=wrong),
    }
    for name, call in calls.items():
        for wrong in (0.9, ["a"], data):
            with pytest.raises(pae.ArgumentError, match=f"^{name.strip()} must be a dict {{task: .*found a value of"):
                call(wrong)
    for name, call in {
        "tasks": lambda wrong: pae.write_bundle(tmp_path / "new", net, frozen, tasks=wrong),
        "tasks ": lambda wrong: pae.Server(net, frozen, tasks=wrong),
        "platforms": lambda wrong: pae.export(net, frozen, "a", platforms=wrong),
    }.items():
        with pytest.raises(pae.ArgumentError, match=f"^{name.strip()} must be a collection of names, found 5"):
            call(5)
    assert not (tmp_path / "new").exists()


def test_names_may_come_from_a_generator(net, frozen, tmp_path):
    header = pae.write_bundle(tmp_path / "new", net, frozen, tasks=(name for name in frozen.tasks))
    assert [task["name"] for task in header["tasks"]] == list(pae.Server(net, frozen, tasks=iter(["a"])).tasks) == ["a"]


def test_what_makes_no_module_of_the_right_kind_is_refused_at_once(vector_module):
    class Other(nnx.Module):
        def __init__(self, width, rngs):
            self.dense = nnx.Linear(4, 8, rngs=rngs)

    sample = jnp.zeros((1, 4))
    for wrong, found in [(3, "a value of type int"), (vector_module(), "a value of type Vector")]:
        with pytest.raises(pae.ArgumentError, match=f"build must make a Linen module from a width.*{found}$"):
            pae.linen(wrong, sample)
    for wrong in (Other, Other(1, nnx.Rngs(0))):
        with pytest.raises(
            pae.ArgumentError, match=r"build must make a Linen module.*Other. For NNX modules use pae.nnx"
        ):
            pae.linen(wrong, sample)
    for wrong in (vector_module, vector_module()):
        with pytest.raises(pae.ArgumentError, match=r"build must make an NNX.*Vector. For Linen modules use pae.linen"):
            pae.nnx(wrong, sample)


def test_the_name_of_a_task_and_inputs_may_not_change_places(net, frozen, data):
    for predict in (pae.Server(net, frozen).predict, lambda x, task: pae.predict(net, frozen, x, task)):
        with pytest.raises(pae.UnknownTaskError, match=r"a task is given by its name, found a value of type ndarray;"):
            predict(data[0], "a")
