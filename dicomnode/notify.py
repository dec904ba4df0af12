"""Tells systemd that the node is up, and that it still is (sd_notify(3)); without it, nothing."""

import contextlib
import os
import socket
import time

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_last_alive = 0.0
_last_status = ""


def ready() -> None:
    """Say that what this process is for can be had from now on."""
    _tell("READY=1")


def status(text: str) -> None:
    """Say in a line how it is; `systemctl status` shows it. No patient attribute."""
    global _last_status
    if text != _last_status:
        _last_status = text
        _tell(f"STATUS={text}")


def stopping() -> None:
    """Say that the end was asked for."""
    _tell("STOPPING=1")


def alive() -> None:
    """Say that work goes on; may be called as often as you like.

    Without it for WatchdogSec, systemd takes the process for stuck, and restarts it.
    """
    global _last_alive
    every_s = _watchdog_s() / 3
    if every_s and time.monotonic() - _last_alive >= every_s:
        _last_alive = time.monotonic()
        _tell("WATCHDOG=1")


def _watchdog_s() -> float:
    # Of a child that inherited the environment it is not asked.
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0


def _tell(text: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # abstract, unix(7)
        address = "\0" + address[1:]
    # The node does not depend on who watches it.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), address)
