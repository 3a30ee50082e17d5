"""Fixtures that keep what every trainer of a process would repeat: half of a tiny training."""

import functools
import uuid

import accelerate.utils.imports
import datasets.fingerprint
import pytest

from liger_trainer.injection.rules import norm, rotary
from liger_trainer.injection.rules.proposal import fingerprint

_proofs = {}
_identify_norm, _identify_rotary = norm.identify, rotary.identify
_is_package_available = functools.cache(accelerate.utils.imports._is_package_available)


@pytest.fixture(autouse=True)
def proven_once(monkeypatch):
    """Prove each norm and each rotary function once. Proofs are the subject of tests/injection."""
    monkeypatch.setattr(norm, "identify", _norm)
    monkeypatch.setattr(rotary, "identify", _rotary)


@pytest.fixture(autouse=True)
def looked_up_once(monkeypatch):
    """Read the metadata of a package once. TRL asks for peft's twice in each step."""
    monkeypatch.setattr(accelerate.utils.imports, "_is_package_available", _is_package_available)


@pytest.fixture(autouse=True)
def never_hashed(monkeypatch):
    """Give data a new name each time instead of hashing what it is made by, functions and all:
    nothing that is prepared is looked for in the cache of `datasets`."""
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", lambda *_: uuid.uuid4().hex[:16])


def _norm(module, device):
    return _proof(fingerprint(module, device), _identify_norm, module, device)


def _rotary(function, device):
    return _proof((function, str(device)), _identify_rotary, function, device)


def _proof(key, identify, *arguments):
    if key not in _proofs:
        _proofs[key] = identify(*arguments)
    return _proofs[key]
