"""Tasks on a pretrained encoder, in small: a tiny random encoder, made sentences, the stages of the real run."""

import json
import sys

import jax
import numpy as np
import pytest

import pae_jax as pae


@pytest.fixture(scope="module")
def script(program):
    return program("pretrained_text/pretrained_text.py")


def call(script, out, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrained_text.py", "--quick", "--out", str(out), *arguments])
        script.main()


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    ways = ["ncm", "lora-4", "shira-0.01", "reuse", "budget"]
    call(script, out, "--tasks", "subj", "mpqa", "--epochs", "2", "--ways", *ways)
    return out


def test_every_way_has_its_row_with_bytes_and_no_packed_way_forgets(run):
    rows = {row["way"]: row for row in json.loads((run / "results.json").read_text())["ways"]}
    assert set(rows) == {"ncm", "lora-4", "shira-0.01", "reuse", "budget"}
    assert {way for way, row in rows.items() if row["ours"]} == {"reuse", "budget"}
    assert all(
        0.0 <= row["accuracy"] <= 1.0 and row["stored"] > 0 and row["forgetting"] == 0.0 for row in rows.values()
    )
    assert (run / "accuracy_per_byte.png").stat().st_size > 10_000


def test_the_pretrained_encoder_and_older_tasks_keep_their_bits(script, run):
    encoder, tokenise = script.text_encoder.tiny()
    net = script.pretrained_run.pretrained_packing.network(encoder)
    x = tokenise(["w1 w2 w3", "w7 w8"], 8)
    for way in ("reuse", "budget"):
        stages = [pae.load(net, path) for path in sorted((run / "seed-0" / way / "stages").iterdir())]
        assert [list(stage.tasks) for stage in stages] == [
            ["pretrained"], ["pretrained", "subj"], ["pretrained", "subj", "mpqa"]
        ]  # fmt: skip
        for task in ("pretrained", "subj"):
            answers = [np.asarray(pae.predict(net, stage, task, x)) for stage in stages if task in stage.tasks]
            assert all(answer.tobytes() == answers[0].tobytes() for answer in answers)


def test_a_finished_way_is_not_trained_again(script, run, capsys):
    call(script, run, "--tasks", "subj", "mpqa", "--epochs", "2", "--ways", "lora-4", "reuse")
    assert "learned" not in capsys.readouterr().out


def test_other_settings_in_a_folder_are_refused(script, run):
    with pytest.raises(SystemExit, match="other settings"):
        call(script, run, "--tasks", "subj", "mpqa", "--epochs", "3", "--ways", "ncm")


def test_a_line_without_a_tab_is_named(script, tmp_path):
    (tmp_path / "a.train.tsv").write_text("0\tfine\nbroken\n")
    with pytest.raises(SystemExit, match=r"a\.train\.tsv, line 2"):
        script.text_tasks.read_lines(tmp_path, "a.train")


def test_low_rank_adapters_start_as_the_pretrained_encoder(script):
    encoder, tokenise = script.text_encoder.tiny()
    x, features = tokenise(["w1 w2 w3", "w7 w8"], 8), []
    for way in ("probe", "lora-4", "shira-0.01"):
        changes = script.pretrained_run.pretrained_rivals.adapter(way, encoder, 0)
        start = changes.start(jax.random.key(0))
        features.append(np.asarray(changes.features(changes.fixed, start, x)))
    np.testing.assert_allclose(features[1], features[0], atol=1e-5)
    np.testing.assert_array_equal(features[2], features[0])


def test_the_domain_of_a_sentence_is_found_and_a_finished_task_is_not_learned_again(program, tmp_path, monkeypatch):
    script = program("pretrained_text/text_unknown.py")
    tiny, lines = script.text_encoder.tiny(), script.text_tasks.made_lines("a", 4, 96, (64, 32, 32))
    for part, rows in lines.items():
        text = "".join(f"{label}\t{sentence}\n" for label, sentence in rows)
        (tmp_path / f"clinc150.{part}.tsv").write_text(text)
    (tmp_path / "clinc150.labels.json").write_text('["w", "x", "y", "z"]')
    (tmp_path / "clinc_domains.json").write_text('{"one": ["w", "x"], "two": ["y", "z"]}')
    words = ["text_unknown.py", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(script.text_encoder, "load", lambda model: tiny)
    script.main()
    found = (tmp_path / "out" / "unknown.json").read_text()
    rows = {(row["way"], row["rule"]): row for row in json.loads(found)["rows"]}
    rules = ["told", "nearest class mean", "confidence", "entropy"]
    assert list(rows) == [
        ("ncm", "nearest class mean"),
        *((way, rule) for way in ("lora-8", "expand") for rule in rules),
    ]
    assert all(0.0 <= row["both"] <= row["domain"] <= 1.0 for row in rows.values())
    assert rows["expand", "told"]["domain"] == 1.0
    monkeypatch.setattr(script.pretrained_rivals, "fitted", None)
    monkeypatch.setattr(script.pretrained_packing, "learn", None)
    script.main()
    assert (tmp_path / "out" / "unknown.json").read_text() == found
