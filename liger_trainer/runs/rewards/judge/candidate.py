"""The process that runs an untrusted program, and answers calls of one function with plain data.

It never sees the tests. Whatever the program redefines, forges or inspects, only bytes leave this
process, which the checking process decodes as plain data or rejects.
"""

import os

from liger_trainer.runs.rewards.judge.limits import limit
from liger_trainer.runs.rewards.judge.wire import items_of, receive, send


def main(seconds: str, memory_mib: str, filter_: str) -> None:
    """Serve the calls that arrive on standard input, a socket, until its other end closes.

    `filter_` is the seccomp program in hexadecimal digits, or empty if it is installed already.
    """
    channel = os.dup(0)
    os.dup2(1, 0)  # so that the program cannot read the socket as its standard input
    limit(int(seconds), int(memory_mib))
    if filter_:
        from liger_trainer.runs.rewards.judge.namespaces import install_filter

        install_filter(bytes.fromhex(filter_))
    try:
        _serve(channel)
    finally:
        os._exit(0)


def _serve(channel: int) -> None:
    program, name = receive(channel)
    scope = {"__name__": "__main__"}
    try:
        exec(compile(program, "<program>", "exec"), scope)
        function = scope[name]
    except Exception as error:
        send(channel, ("raised", type(error).__name__, ""))
        return
    send(channel, ("ready",))
    while True:
        args, kwargs, in_place = receive(channel)
        try:
            result = function(*args, **kwargs)
            if hasattr(result, "__next__"):
                result = iter(items_of(result))  # here, so that its exceptions are caught below
        except Exception as error:
            send(channel, ("raised", type(error).__name__, str(error)[:1000]))
            continue
        try:
            send(channel, ("returned", result, args if in_place else None))
        except (TypeError, ValueError) as error:
            send(channel, ("returned no plain data", str(error)[:1000]))
