"""The server on a cluster: the same app as a Ray Serve deployment.

Each replica holds the backbone and the bank, and runs all tasks of a batch in one pass. So a task is a name in a
request and no model of its own. Nothing is multiplexed. The bank's folder is where replicas agree. Each request looks
at the folder. So a task that one replica adds or removes is on the others with their next request.

    serve run sidestep.serve.ray:deployment bank=/shared/tasks replicas=2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from sidestep.serve.app import create_app
from sidestep.serve.core import Core
from sidestep.serve.guard import App, Message, Receive, Scope, Send
from sidestep.serve.keys import Keys
from sidestep.serve.metrics import Metrics
from sidestep.serve.settings import ServeSettings
from sidestep.tasks.bank_folder import BankFolder
from sidestep.tasks.open_bank import open_bank

HEALTH_SECONDS = 10
"""Between two looks at whether a replica works."""


class Arguments(BaseModel):
    """What `serve run` takes as name=value, and a config file under `args`.

    Attributes:
        bank: folder that all nodes can read, and write if tasks are added over HTTP.
        backbone: where the backbone is. None: where the tasks found it.
        keys: file with keys, as of `sidestep serve`. The variables of the replicas are read too.
        without_keys: must be said where there are none. Then only requests to localhost are answered.
        replicas: at least so many.
        most_replicas: Ray starts up to so many while requests wait. None: `replicas`.
        ongoing: requests of a replica that count as its full load.
        cpus, gpus: of a replica. Its model uses as many threads as it has CPUs.
        settings: of each replica, as of `ServeSettings`.
    """

    model_config = ConfigDict(extra="forbid")

    bank: str
    backbone: str | None = None
    keys: str | None = None
    without_keys: bool = False
    replicas: int = Field(1, ge=1)
    most_replicas: int | None = Field(None, ge=1)
    ongoing: int = Field(32, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)


class WithoutId:
    """The app without the ids of requests in its headers. Ray's proxy gives each request its id, and sends it back."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, tell)


@serve.ingress()
class Replica:
    """A bank on its backbone, which the app is built on when the replica starts."""

    def __init__(self, given: dict[str, Any]) -> None:
        import torch

        arguments = Arguments(**given)
        torch.set_num_threads(max(1, int(arguments.cpus)))
        self.keys = keys_of(arguments)  # again, because another node has other variables
        device = None if arguments.gpus else "cpu"
        bank = open_bank(BankFolder(arguments.bank), moved_to=arguments.backbone, device=device)
        self.core = Core(bank, settings_of(arguments), Metrics())

    def __serve_build_asgi_app__(self) -> WithoutId:
        """The app, on the replica's own bank."""
        return WithoutId(create_app(self.core, keys=self.keys))

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises an error."""
        if not self.core.alive:
            raise RuntimeError("the thread that runs the model has stopped")


def deployment(args: Arguments) -> Application:
    """The application, for `serve run` and for config files.

    Raises:
        ValueError: for settings that there are not, or if there are no keys and nobody said so.
    """
    settings = settings_of(args)
    keys_of(args)
    scaling = {
        "min_replicas": args.replicas,
        "max_replicas": max(args.replicas, args.most_replicas or args.replicas),
        "target_ongoing_requests": args.ongoing,
    }
    made = serve.deployment(
        Replica,
        name="Bank",
        autoscaling_config=scaling,
        # more than its load, so that the bank's own queue puts them together and refuses what is too much
        max_ongoing_requests=4 * args.ongoing,
        max_queued_requests=8 * args.ongoing,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )
    return made.bind(args.model_dump())


def keys_of(args: Arguments) -> Keys | None:
    """The keys of a file and of this machine's variables.

    Raises:
        ValueError: if there are none, and nobody said so.
    """
    keys = Keys.found(None if args.keys is None else Path(args.keys))
    if keys is None and not args.without_keys:
        raise ValueError(
            "there are no keys, and others may reach the proxy of a cluster: give keys=FILE, set SIDESTEP_KEYS, or say "
            "without_keys=true"
        )
    return keys


def settings_of(args: Arguments) -> ServeSettings:
    """The settings of a replica.

    Raises:
        ValueError: for one that there is not, or out of range.
    """
    root = args.settings.get("root")
    try:
        return ServeSettings(**{**args.settings, "root": None if root is None else Path(root)})
    except TypeError as error:
        known = ", ".join(ServeSettings.__dataclass_fields__)
        raise ValueError(f"settings={args.settings}: {error}. There are {known}") from error
