"""An error of a run on several processes is printed once, and ends all of them with its code."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from liger_trainer.runs import engine, processes
from liger_trainer.runs.errors import Reported, RunError
from liger_trainer.runs.processes import ending_together


@pytest.fixture(autouse=True)
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def launched(monkeypatch):
    """What torchrun sets, and the store that it hosts."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    store = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    values = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "WORLD_SIZE": 2,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "_MOMENT", 0.1)
    return store


def ended(error, rank, monkeypatch):
    """Return the exit code of the process `rank`, in which `error` is raised."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(Reported) as reported, ending_together(debug=False):
        raise error
    return reported.value.code


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_wrong_input_is_told_by_the_first_that_finds_it(launched, monkeypatch, capsys, ranks):
    assert [ended(ValueError("no such key"), rank, monkeypatch) for rank in ranks] == [2, 2]
    assert capsys.readouterr().err == "error: no such key\n"


@pytest.mark.parametrize("lost", [RuntimeError("connection closed"), RunError("not saved")])
def test_who_loses_the_connection_to_it_says_nothing(launched, monkeypatch, capsys, lost):
    assert ended(OSError("no such file"), 1, monkeypatch) == 2
    assert ended(lost, 0, monkeypatch) == 2
    assert capsys.readouterr().err == "error: no such file\n"


def test_what_is_lost_first_waits_for_the_reason(launched, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_MOMENT", 20)
    launched.add("liger_trainer/error/0/count", 1)
    threading.Timer(0.1, lambda: launched.set("liger_trainer/error/0", "2")).start()
    assert ended(RuntimeError("connection closed"), 0, monkeypatch) == 2
    assert capsys.readouterr().err == ""


def test_an_unexpected_error_is_told_with_its_traceback(launched, monkeypatch, capsys):
    assert ended(RuntimeError("a bug"), 1, monkeypatch) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("RuntimeError: a bug\n")


def test_what_the_launcher_ends_after_a_kill_says_nothing(launched, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_MOMENT", 20)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert ended(RuntimeError("connection closed"), 0, monkeypatch) == 1
    assert capsys.readouterr().err == ""


def test_who_is_ended_while_it_reports_says_nothing(launched, monkeypatch, capsys):
    assert ended(OSError("no such file"), 0, monkeypatch) == 2
    plain = processes._store

    def store():
        signal.raise_signal(signal.SIGTERM)
        return plain()

    monkeypatch.setattr(processes, "_store", store)
    assert ended(RunError("not saved"), 1, monkeypatch) == 2
    assert capsys.readouterr().err == "error: no such file\n"


def test_none_ends_before_the_reason_is_printed(launched, monkeypatch, capsys):
    order = []

    def slowly(error, *, debug):
        time.sleep(0.3)
        order.append("printed")
        return 2

    monkeypatch.setattr(processes, "report", slowly)
    arguments = (ValueError("a"), False, threading.Event())
    other = threading.Thread(target=processes._reported, args=arguments)
    other.start()
    while launched.add("liger_trainer/error/0/count", 0) == 0:
        time.sleep(0.01)
    assert processes._reported(*arguments) == 2
    assert order == ["printed"]
    other.join()


def test_a_restarted_run_tells_again(launched, monkeypatch, capsys):
    ended(ValueError("once"), 0, monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ended(ValueError("twice"), 0, monkeypatch)
    assert capsys.readouterr().err == "error: once\nerror: twice\n"


def test_without_a_store_the_first_of_a_machine_tells(launched, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert [ended(ValueError("no such key"), rank, monkeypatch) for rank in (1, 0)] == [2, 2]
    assert capsys.readouterr().err == "error: no such key\n"


def test_alone_sigterm_interrupts_and_other_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ending_together(debug=False):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_none_leaves_before_all_have_come_to_the_end(launched, monkeypatch):
    """The launcher ends the others if one exits with a code, as of a run with bad losses."""
    found = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: found.append("all are there"))
    monkeypatch.setattr(processes, "leave_group", lambda failed: found.append("left"))
    with ending_together(debug=False):
        found.append("report written")
    assert found == ["report written", "all are there", "left"]


@pytest.mark.parametrize(("failed", "left"), [(False, [True]), (True, [])])
def test_after_a_failure_nccl_is_not_waited_for(monkeypatch, failed, left):
    found = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: found.append(True))
    engine.leave_group(failed=failed)
    assert found == left
