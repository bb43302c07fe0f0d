"""Functions that tests of several folders use."""

from types import SimpleNamespace

from hivtp_kernels.backends import load


def emulate(monkeypatch, extension):
    """Put the emulator's extension behind the cuda backend, which then takes CPU tensors only."""
    cuda = load("cuda")
    monkeypatch.setattr(cuda, "_extension", SimpleNamespace(extension=lambda: extension))
    monkeypatch.setattr(cuda, "_queue", lambda device: {"device": 0, "stream": 0})
    monkeypatch.setattr(
        cuda, "unavailable", lambda device, rows=None: None if device.type == "cpu" else "emulated"
    )
