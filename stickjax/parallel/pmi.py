"""Share the address of process 0 through the process manager of MPICH or Intel MPI (PMI version 1).

Every process sends commands to the process manager through a file descriptor. A command is a line of `key=value` words.
Process 0 stores its address in the process manager. Then all processes wait for one another, and read the address.
"""

import os


def share(file: int, value: str | None) -> str:
    """Share `value` of one process with all processes, and return it. Every process must call this function once.

    Args:
      file: the file descriptor of the process manager: the number in the environment variable PMI_FD.
      value: the value to share, in one process; None in all other processes.

    Raises:
      ValueError: the process manager does not answer as PMI version 1 demands.
    """
    try:
        _ask(file, "init pmi_version=1 pmi_subversion=1")
        store = _ask(file, "get_my_kvsname")["kvsname"]
        if value is not None:
            _ask(file, f"put kvsname={store} key=stickjax value={value}")
        _ask(file, "barrier_in")
        found = _ask(file, f"get kvsname={store} key=stickjax")["value"]
        _ask(file, "finalize")
    except (OSError, KeyError) as error:
        problem = f"the process manager at the file descriptor PMI_FD={file} gives no address: {error!r}"
        raise ValueError(f"{problem}; give --coordinator HOST:PORT") from error
    return found


def _ask(file: int, command: str) -> dict[str, str]:
    os.write(file, f"cmd={command}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        if not (more := os.read(file, 1)):
            raise OSError("the process manager has ended")
        answer += more
    found = dict(word.partition("=")[::2] for word in answer.decode().split())
    if found.get("rc", "0") != "0":
        raise OSError(answer.decode().strip())
    return found
