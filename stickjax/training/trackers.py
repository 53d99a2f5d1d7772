"""Send the metrics of a training to a tracker of experiments: TensorBoard, Weights & Biases, or trackio.

The package of a tracker is optional, and is imported only when the tracker is used.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stickjax.config import Config

Log = Callable[[dict], None]  # a function that is called with every row of metrics, {name: number}


def check_tracker(name: str | None) -> None:
    """Raise ValueError if the package of the tracker `name` is not installed. For None, do nothing.

    >>> check_tracker(None)
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ValueError(f"train.track={name!r} needs the package {name}: pip install 'stickjax[{name}]'")


@contextlib.contextmanager
def tracker(config: Config, run: str) -> Iterator[Log | None]:
    """Open the tracker `config.train.track` for the run folder `run`, and yield its function for rows of metrics.

    The tracker is closed at the end of the context. Without a tracker, yield None.

    Raises ImportError if the package of the tracker is not installed (see `check_tracker`).

    >>> with tracker(Config(), "runs/mine") as log:
    ...     print(log)
    None
    """
    if config.train.track is None:
        yield None
        return
    with (_tensorboard if config.train.track == "tensorboard" else _hosted)(config, run) as log:
        yield log


@contextlib.contextmanager
def _tensorboard(config: Config, run: str) -> Iterator[Log]:
    """Yield a function that writes rows of metrics to event files, in the folder `tensorboard` of the run folder."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    del config
    writer, started = EventFileWriter(str(Path(run) / "tensorboard")), []

    def log(row: dict) -> None:
        if not started:  # TensorBoard then drops the events of later steps, which an earlier start has written
            started.append(row["step"])
            session = SessionLog(status=SessionLog.START)
            writer.add_event(Event(wall_time=time.time(), step=row["step"], session_log=session))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        writer.add_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextlib.contextmanager
def _hosted(config: Config, run: str) -> Iterator[Log]:
    """Yield a function that sends rows of metrics to wandb or trackio, in the project "stickjax".

    Both packages have the functions `init`, `log` and `finish`.
    """
    package = importlib.import_module(config.train.track)
    package.init(project="stickjax", name=Path(run).absolute().name, config=config.to_dict())
    try:
        yield lambda row: package.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
    finally:
        package.finish()
