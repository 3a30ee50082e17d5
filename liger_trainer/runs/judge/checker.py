"""The process that holds the tests of a problem, and calls a program that it cannot be touched by.

    share = assertions that held / assertions        (statements at the top of `check`)

The function under test is a proxy: arguments go to the candidate's process as copies, and what
comes back is compared here, as plain built-in values.
"""

import ast
import builtins
import os
import signal
import socket
import warnings

from liger_trainer.runs.judge.limits import limit
from liger_trainer.runs.judge.wire import encode, receive, send

_IN_PLACE = "in_place"


def main(seconds: str, memory_mib: str, filter_: str) -> None:
    """Check, in a process for each, the candidates whose connections arrive on standard input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)
    if filter_:
        from liger_trainer.runs.judge.namespaces import install_filter
    while True:
        _, connections, _, _ = socket.recv_fds(requests, 1, 2)
        if not connections:
            os._exit(0)
        if os.fork() == 0:
            try:
                requests.close()
                limit(int(seconds), int(memory_mib))
                signal.alarm(10 * int(seconds))
                if filter_:
                    install_filter(bytes.fromhex(filter_))
                candidate, report = connections
                send(report, check(candidate, *receive(report)))
            finally:
                os._exit(0)
        for connection in connections:
            os.close(connection)


def check(channel: int, program: str, source: str, tests: str, name: str) -> tuple:
    """Return (held, total, error, note) of the candidate behind `channel`.

    `error` is the name of the first failure, None without one. `note` tells what is wrong with the
    problem, or cannot be checked, as far as it shows.
    """
    candidate = Candidate(channel, name)
    scope = {"__name__": "tests"}
    score = _Score()
    try:
        candidate.start(program)
        code = compile_tests(tests, name)
        _define(source, scope)
        scope[name] = candidate
        scope[_Score.NAME] = score
        exec(code, scope)
        scope["check"](candidate)
    except Lost as lost:
        return 0, 0, str(lost), candidate.note
    except Exception as error:
        kind = type(error).__name__
        if not candidate.calls:
            candidate.note = f"its tests raise {kind} before they call the function: {error}"[:500]
        return 0, 0, kind, candidate.note
    if candidate.lost:  # and the tests caught it
        return 0, 0, candidate.lost, candidate.note
    return score.held, score.total, score.error, candidate.note


def compile_tests(tests: str, name: str):
    """Return the code of `tests`, in which each assertion of `check` counts on its own.

    A call of the function whose result is dropped is there for what it does to its arguments, so it
    changes those of the tests. Elsewhere arguments are copies: the candidate cannot empty the list
    that its answer is compared with.

    Raise ValueError for tests that cannot be run.
    """
    if not isinstance(tests, str) or not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"tests are code and the entry point is a name, not {name!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(tests)
            check = _check_of(tree)
            check.body = [_counted(s) if _asserts(s) else s for s in check.body if not _trivial(s)]
            tree = _InPlace({name, *(argument.arg for argument in check.args.args[:1])}).visit(tree)
            return compile(ast.fix_missing_locations(tree), "<tests>", "exec")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests do not parse: {error}") from error


class Lost(BaseException):
    """The candidate's process ended, or talks nonsense; not for tests to catch."""


class CandidateError(Exception):
    """An exception of a type that only the candidate knows."""


class Candidate:
    """A function that lives in another process."""

    def __init__(self, channel: int, name: str):
        self.__name__ = name
        self.calls = 0
        self.lost: str | None = None
        self.note: str | None = None
        self._channel = channel

    def start(self, program: str) -> None:
        """Run `program` there. Raise Lost where it does not get to define the function."""
        kind, *details = self._ask((program, self.__name__))
        if kind != "ready":
            self._lose(details[0] if kind == "raised" else "protocol")

    def __call__(self, *args, **kwargs):
        return self._call(args, kwargs, False)[0]

    def in_place(self, *args, **kwargs) -> None:
        """Call, and let the arguments become what the candidate has made of them."""
        changed = self._call(args, kwargs, True)[1]
        for ours, theirs in zip(args, changed if isinstance(changed, tuple) else (), strict=False):
            if type(ours) is not type(theirs):
                continue
            if isinstance(ours, (list, bytearray)):
                ours[:] = theirs
            elif isinstance(ours, (dict, set)):
                ours.clear()
                ours.update(theirs)

    def _call(self, args: tuple, kwargs: dict, in_place: bool) -> list:
        self.calls += 1
        try:
            encode(args), encode(kwargs)
        except (TypeError, ValueError) as error:
            self.note = f"its tests pass what is no plain data: {error}"
            raise
        kind, *details = self._ask((args, kwargs, in_place))
        if kind == "returned":
            return details
        if kind == "returned no plain data":
            self.note = f"a candidate returned what is no plain data: {details[0]}"
            raise CandidateError(self.note)
        known = getattr(builtins, details[0], None)
        if not (isinstance(known, type) and issubclass(known, Exception)):
            raise CandidateError(": ".join(details))
        try:
            error = known(details[1])
        except TypeError:  # which takes more than a text
            error = CandidateError(": ".join(details))
        raise error

    def _ask(self, message: tuple) -> tuple:
        """One message there and one back, of the right form."""
        if self.lost:
            raise Lost(self.lost)
        try:
            send(self._channel, message)
            answer = receive(self._channel)
        except (EOFError, OSError):
            self._lose("timeout")
        except ValueError:
            self._lose("protocol")
        kinds = {"ready": 0, "returned": 2, "raised": 2, "returned no plain data": 1}
        if not (isinstance(answer, tuple) and answer and isinstance(answer[0], str)):
            self._lose("protocol")
        kind, *details = answer
        texts = kind == "returned" or all(isinstance(detail, str) for detail in details)
        if kinds.get(kind) != len(details) or not texts:
            self._lose("protocol")
        return answer

    def _lose(self, why: str) -> None:
        self.lost = why
        raise Lost(why)


class _Score:
    """How many assertions held, and how the first one failed."""

    NAME = "__score__"

    def __init__(self):
        self.held, self.total, self.error = 0, 0, None

    def __enter__(self):
        self.total += 1

    def __exit__(self, kind, error, trace) -> bool:
        self.held += kind is None
        self.error = self.error or (kind and kind.__name__)
        return kind is None or issubclass(kind, Exception)


class _InPlace(ast.NodeTransformer):
    def __init__(self, names: set[str]):
        self.names = names

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        call = node.value
        dropped = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if dropped and call.func.id in self.names:
            call.func = ast.Attribute(call.func, _IN_PLACE, ast.Load())
        return node


def _check_of(tree: ast.Module) -> ast.FunctionDef:
    """Return the function `check`, which has to take a function and to assert something."""
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    if not found:
        raise ValueError("the tests define no function `check(candidate)`")
    if not any(_asserts(s) and not _trivial(s) for s in found[-1].body):
        raise ValueError("`check` of the tests has no assertion in its body")
    return found[-1]


def _counted(statement: ast.stmt) -> ast.stmt:
    block = ast.parse(f"with {_Score.NAME}:\n    pass").body[0]
    block.body = [statement]
    return block


def _asserts(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def _trivial(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant)


def _define(source: str, scope: dict) -> None:
    """Define what the problem's own text defines, which its tests may use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for text in (source, source + "    pass\n"):  # a head may still lack its body
            try:
                code = compile(text, "<source>", "exec")
            except (SyntaxError, ValueError):
                continue
            try:
                exec(code, scope)
            except Exception:  # the tests then miss a name, and say which
                return
            return
