"""`sidestep serve`: a bank over HTTP."""

from __future__ import annotations

import errno
import logging
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named
from sidestep.console import hush, remark

if TYPE_CHECKING:
    from sidestep.serve.core import Core
    from sidestep.serve.keys import Keys

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIB = 1024**2


def serve(
    folder: opt.Bank,
    backbone: opt.OtherBackbone = None,
    gguf: opt.Gguf = None,
    device: opt.Device = None,
    keep: opt.KeepTasks = None,
    compiled: opt.Compiled = False,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    keys: opt.KeysFile = None,
    root: opt.Root = None,
    max_tokens: opt.MaxTokens = 16384,
    max_rows: opt.MaxRows = 64,
    max_wait_ms: opt.MaxWait = 2.0,
    queue: opt.Queue = 1024,
    request_rows: opt.RequestRows = 256,
    request_tokens: opt.RequestTokens = 131072,
    body_mib: opt.BodyMib = 32,
    upload_mib: opt.UploadMib = 1024,
    seconds: opt.Seconds = 60.0,
    drain_seconds: opt.DrainSeconds = 30.0,
    quiet: opt.NoLog = False,
    debug: opt.Debug = False,
) -> None:
    """Answer requests over HTTP from the tasks of a bank, which may be added and removed meanwhile."""
    with reporting(debug):
        try:
            import uvicorn

            from sidestep.serve.app import create_app
            from sidestep.serve.metrics import Metrics
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is not installed: install the extra with pip install 'sidestep[serve]'"
            ) from error
        from sidestep.serve.core import Core
        from sidestep.serve.keys import Keys
        from sidestep.serve.settings import ServeSettings
        from sidestep.tasks.bank_folder import BankFolder
        from sidestep.tasks.open_bank import open_bank

        hush()
        settings = ServeSettings(
            max_tokens=max_tokens,
            max_rows=max_rows,
            max_wait_ms=max_wait_ms,
            queue=queue,
            request_rows=request_rows,
            request_tokens=request_tokens,
            body_bytes=body_mib * MIB,
            upload_bytes=upload_mib * MIB,
            seconds=seconds,
            drain_seconds=drain_seconds,
            root=root,
        )
        known = Keys.found(keys)
        check_host(host, known)
        with listening(host, port) as taken:  # before a backbone is read
            bank = open_bank(BankFolder(folder), moved_to=backbone_named(backbone, gguf), device=device, keep=keep)
            if compiled:
                bank.compile(dynamic=True)
            core = Core(bank, settings, Metrics())
            logging.getLogger("sidestep.serve").setLevel(logging.WARNING if quiet else logging.INFO)
            config = uvicorn.Config(
                create_app(core, keys=known),
                log_config=LOGS,
                access_log=False,  # the app writes a line for each request, with its id
                server_header=False,
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
            )
            address = taken.getsockname()
            remark(f"{_told(core, known)} on http://{f'[{host}]' if ':' in host else host}:{address[1]}")
            # uvicorn stops gracefully, and then sends itself the signal again
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[taken])
            remark("Stopped: all requests that were waiting have been answered or refused")


LOGS = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"plain": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {
        "sidestep.serve": {"handlers": ["plain"], "propagate": False},
        "uvicorn": {"handlers": ["plain"], "level": "WARNING", "propagate": False},
    },
}


def check_host(host: str, keys: Keys | None) -> None:
    """Refuse to be reached from elsewhere without keys.

    Raises:
        ValueError: saying how keys are given.
    """
    if keys is None and host not in LOOPBACK:
        raise ValueError(
            f"--host {host} can be reached by others, and there are no keys: name a file with them (--keys), or listen "
            f"on {LOOPBACK[0]}. SIDESTEP_KEYS and SIDESTEP_CHANGE_KEYS may hold keys too"
        )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: saying that the port is in use, or what else is wrong.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(2048)
    except (OSError, OverflowError) as error:
        taken.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            told = f"port {port} of {host} is in use: stop what listens there, or choose another (--port)"
        else:
            told = f"nothing can listen on port {port} of {host} ({error}): choose others (--host, --port)"
        raise OSError(told) from error
    return taken


def _told(core: Core, keys: Keys | None) -> str:
    asked = "with keys" if keys is not None else "without keys, for this machine alone"
    return f"{len(core.bank.names)} tasks on {core.known.backbone} are served {asked}"
