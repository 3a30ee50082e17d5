"""The process that runs the tests of a problem; the tested program cannot touch it.

    share = assertions that held / assertions        (top-level statements of `check`)

The function under test is a proxy: its arguments are copied to the candidate's process, and the
results are compared here, as plain built-in values.
"""

import ast
import builtins
import os
import signal
import socket
import warnings

from liger_trainer.runs.rewards.judge.limits import limit
from liger_trainer.runs.rewards.judge.wire import encode, receive, send

_IN_PLACE = "in_place"


def main(seconds: str, memory_mib: str, filter_: str) -> None:
    """Check the candidates whose connections arrive on standard input, each in its own process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # child processes are not waited for
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)
    if filter_:
        from liger_trainer.runs.rewards.judge.namespaces import install_filter
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
    """Return (held, total, error, note) for the candidate behind `channel`.

    `error` is the name of the first failure, or None. `note` states what is wrong with the problem
    or could not be checked, if that was noticed.
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
    if candidate.lost:  # even if the tests caught the exception
        return 0, 0, candidate.lost, candidate.note
    return score.held, score.total, score.error, candidate.note


def compile_tests(tests: str, name: str):
    """Return the code of `tests`, compiled such that each assertion of `check` is counted.

    A call of the function whose result is not used must be meant to change its arguments, so the
    changes are copied back. In all other calls arguments are copies: the candidate cannot empty the
    list with which its answer is compared.

    Raises ValueError for tests that cannot be run.
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
    """The candidate's process ended or sent malformed data. Tests should not catch this."""


class CandidateError(Exception):
    """An exception of the candidate whose type is not a built-in."""


class Candidate:
    """A proxy for a function in another process."""

    def __init__(self, channel: int, name: str):
        self.__name__ = name
        self.calls = 0
        self.lost: str | None = None
        self.note: str | None = None
        self._channel = channel

    def start(self, program: str) -> None:
        """Run `program` in the other process. Raise Lost if it does not define the function."""
        kind, *details = self._ask((program, self.__name__))
        if kind != "ready":
            self._lose(details[0] if kind == "raised" else "protocol")

    def __call__(self, *args, **kwargs):
        return self._call(args, kwargs, False)[0]

    def in_place(self, *args, **kwargs) -> None:
        """Call the function, and copy the candidate's changes of the arguments back."""
        changed = self._call(args, kwargs, True)[1]
        for own, new in zip(args, changed if isinstance(changed, tuple) else (), strict=False):
            if type(own) is not type(new):
                continue
            if isinstance(own, (list, bytearray)):
                own[:] = new
            elif isinstance(own, (dict, set)):
                own.clear()
                own.update(new)

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
        except TypeError:  # its constructor takes more than a message
            error = CandidateError(": ".join(details))
        raise error

    def _ask(self, message: tuple) -> tuple:
        """Send a message and return the answer; raise Lost if it is missing or malformed."""
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
    """Count assertions that held, as a context manager around each; keep the first failure."""

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
    """Return the function `check`; raise ValueError if it is missing or asserts nothing."""
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
    """Run the problem's own code in `scope`, because tests may use its definitions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for text in (source, source + "    pass\n"):  # the function's body may be missing
            try:
                code = compile(text, "<source>", "exec")
            except (SyntaxError, ValueError):
                continue
            try:
                exec(code, scope)
            except Exception:  # the tests then raise NameError for what is missing
                return
            return
