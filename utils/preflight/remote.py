"""What lies outside this folder: optional packages, the hub and its cache, trackers. Asked before training, not after.

Nothing here ever waits for a person: a run on a cluster has nobody to answer.
"""

import argparse
import importlib.util
import netrc
import os
import re
import socket
import urllib.parse
from pathlib import Path

from utils.errors import warn

PATIENCE = 20.0  # seconds in which the hub must answer before training; afterwards it is asked once more
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet-ml", "trackio": "trackio"}


def packages(args: argparse.Namespace) -> list[str]:
    """Complaints about packages that the options need and that are not installed."""
    wanted = [
        (f"--report_to {name}", name, package) for name, package in TRACKER_PACKAGES.items() if name in args.report_to
    ]
    if args.use_8bit_adam:
        wanted.append(("--use_8bit_adam", "bitsandbytes", "bitsandbytes"))
    if args.optimizer == "lion":
        wanted.append(("--optimizer lion", "bitsandbytes", "bitsandbytes"))
    if args.optimizer == "prodigy":
        wanted.append(("--optimizer prodigy", "prodigyopt", "prodigyopt"))
    if "lpips" in args.scores:
        wanted += [("--scores lpips", name, name) for name in ("torchmetrics", "torchvision")]
    if args.dataset_name:
        wanted.append(("--dataset_name", "datasets", "datasets"))
    complaints = [
        f"{option} needs a package that is not installed: pip install {package}"
        for option, module, package in wanted
        if not importlib.util.find_spec(module)
    ]
    option = "--enable_xformers_memory_efficient_attention"
    if args.enable_xformers_memory_efficient_attention and not importlib.util.find_spec("xformers"):
        complaints.append(
            f"{option} needs: pip install xformers; without the option PyTorch's own attention does the same"
        )
    return complaints


def trackers(args: argparse.Namespace) -> list[str]:
    """Complaints about trackers that would ask for a log-in; wandb can go on without one."""
    online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
    if "wandb" in args.report_to and online and not _wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        warn("wandb is not logged in: the run is recorded offline; 'wandb login' before, or 'wandb sync' after it")
    known = os.environ.get("COMET_API_KEY") or Path("~/.comet.config").expanduser().is_file()
    if "comet_ml" in args.report_to and not known:
        return ["--report_to comet_ml: no API key; export COMET_API_KEY or run: comet login"]
    return []


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = re.sub(r"^https?://|[:/].*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def reachable() -> bool:
    """Whether the hub answers at all: its client would try again for half a minute before it says no."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
        return True
    except OSError:
        return False


def patient(seconds: float) -> None:
    """Let the hub's client give up on a hub that sends nothing for so long: by itself it waits for ever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client():
        made = default_client_factory()
        made.timeout = seconds
        return made

    set_client_factory(client)


def hub(args: argparse.Namespace) -> list[str]:
    """Complaints about the rights to upload. A hub that is merely out of reach now is no reason not to train."""
    if not args.push_to_hub:
        return []
    if args.hub_model_id and not REPOSITORY.fullmatch(args.hub_model_id):
        return [f"--hub_model_id {args.hub_model_id} is no repository name of the form owner/name"]
    import huggingface_hub

    if offline():
        return ["--push_to_hub with HF_HUB_OFFLINE=1: unset it, or leave the option out"]
    if not huggingface_hub.get_token():
        return ["--push_to_hub: nobody is logged in; run: hf auth login, or export HF_TOKEN"]
    if not reachable():
        warn("--push_to_hub: the hub cannot be reached now; the upload is tried after training")
        return []
    patient(PATIENCE)
    try:
        account = huggingface_hub.whoami()
    except huggingface_hub.errors.HfHubHTTPError as problem:
        if getattr(problem.response, "status_code", None) in (401, 403):
            return ["--push_to_hub: the hub refuses the token (expired or mistyped); run: hf auth login"]
        warn(f"--push_to_hub: the hub answers {problem.response.status_code} now; the upload is tried after training")
        return []
    except Exception as problem:  # no network in one of its many shapes
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        warn(f"--push_to_hub: the hub cannot be reached now ({reason}); the upload is tried after training")
        return []
    return _rights(account, args.hub_model_id)


def _rights(account: dict, repository: str | None) -> list[str]:
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return ["--push_to_hub: the token may only read; make one with write access on huggingface.co/settings/tokens"]
    owner = repository.split("/")[0] if repository and "/" in repository else account.get("name")
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs", []))]
    if owner not in owners:
        names = ", ".join(name for name in owners if name)
        return [f"--hub_model_id {repository}: the token belongs to {names} and cannot write to {owner}"]
    return []
