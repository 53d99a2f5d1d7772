"""The name "RUN@STEP" of the checkpoint from which a new run continues, with another config and in another folder."""

from pathlib import Path


def split_branch(branch: str) -> tuple[str, int | None]:
    """Split "RUN@STEP" into (folder, step). Without "@STEP", the step is None, which means the newest checkpoint.

    If `branch` is the path of an existing folder, it is not split, even if it contains an @. Raise ValueError if STEP
    is not a number.
    """
    run, at, step = branch.rpartition("@")
    if not at or Path(branch).is_dir():
        return branch, None
    if not (step.isascii() and step.isdecimal()):
        raise ValueError(
            f"--from {branch}: there is no such folder, and {step!r} is not the number of a step (RUN@STEP)"
        )
    return run, int(step)


def check_other_folder(branch: str | None, run: str) -> None:
    """Raise ValueError if `run` is the folder of the checkpoint `branch`, "RUN@STEP"."""
    if branch is not None and Path(split_branch(branch)[0]).resolve() == Path(run).resolve():
        raise ValueError(f"--from {branch} and --run {run} name the same folder; a branch needs a folder of its own")
