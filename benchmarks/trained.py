"""python -m benchmarks.trained RUN [--part P,..] [--max-examples N] [--json]: accuracy and training curve of a run.

RUN is the run folder of a model that reads examples, such as a classifier or a translator. A bucket is a group of
examples of about the same length. For each part of the data in --part, the program computes the accuracy of the model
for each bucket, as `python -m stickjax.evaluate` does. --json also writes the accuracies, the curve of the training and
the config to benchmarks/results/NAME.json, where NAME is the name of the run folder.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from stickjax.config.command import Parser, command
from stickjax.data.examples import task_of
from stickjax.evaluation import examples
from stickjax.storage.run_folder import load
from stickjax.training.metrics import metrics_of

from .report import Row, machine, write_json

RESULTS = Path(__file__).parent / "results"
POINTS = 50  # the largest number of points of the curve in the file


def curve(run: str, step: int) -> dict[str, list[float]]:
    """Return {name of a metric: values} for at most POINTS of the steps that a run logged, none of them after `step`.

    The steps are at equal distances in the log. The last of them is the last logged step that is not after `step`.
    """
    columns = metrics_of(run)
    columns = {name: values[columns["step"] <= step] for name, values in columns.items()}
    stride = -(-len(columns["step"]) // POINTS)
    return {name: values[::-1][::stride][::-1].tolist() for name, values in columns.items()}


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.trained", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run folder of a model that reads examples")
    parser.add_argument("--part", default="test", help="which examples, such as valid, or test,gen (default test)")
    parser.add_argument("--max-examples", type=int, default=1024, help="examples in a bucket at most (default 1024)")
    parser.add_argument(
        "--json", action="store_true", help="also write benchmarks/results/NAME.json, where NAME is the name of RUN"
    )
    arguments = parser.parse_args(argv)
    info, loaded, console = machine(), load(arguments.run), Console(width=100)
    task, records = task_of(loaded.config), []
    for part in arguments.part.split(","):
        found = examples.accuracy(
            loaded.model, loaded.config, part=part, max_examples=arguments.max_examples, say=console.print
        )
        console.print(examples.table({f"{Path(arguments.run).name}, {part}": found}, task.bucket_name))
        records += [{"part": part} | record for record in found]
    if arguments.json:
        rows = [
            Row("trained", f"{task.bucket_name or record['part']}: {record['bucket']}", task.name, extra=record)
            for record in records
        ]
        about = dict(step=loaded.step, config=json.loads(loaded.config.to_json()))
        file = RESULTS / f"{Path(arguments.run).resolve().name}.json"
        write_json(file, info | about | {"curve": curve(arguments.run, loaded.step)}, rows)
        console.print(file.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
