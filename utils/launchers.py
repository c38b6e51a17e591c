"""`accelerate launch` and `torchrun`, as the process that they started sees them.

Standard library only: options are refused before anything heavy is imported.
"""

import os
import sys

LAUNCHERS = {  # what stands in a process list, and the words that start the same
    "accelerate": ["accelerate"],
    "accelerate.commands.accelerate_cli": ["accelerate"],
    "accelerate-launch": ["accelerate", "launch"],
    "accelerate.commands.launch": ["accelerate", "launch"],
    "torchrun": ["torchrun"],
    "torch.distributed.run": ["torchrun"],
}
TRACES = {"accelerate": "ACCELERATE_MIXED_PRECISION", "torchrun": "TORCHELASTIC_RUN_ID"}  # left in the environment


def launcher_words(name: str = "accelerate") -> list[str]:
    """The command line of the `accelerate launch` (or `torchrun`) that started this process, from the launcher's name
    on; empty when something else did.

    Settings in the environment alone prove nothing, people export them in their shell.
    """
    if TRACES[name] not in os.environ:
        return []
    try:
        with open(f"/proc/{os.getppid()}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")[:-1]
    except OSError:
        return []
    for place, word in enumerate(words[:3]):  # python, -m, the launcher
        meant = LAUNCHERS.get(os.path.basename(word), [""])
        if meant[0] == name:
            return [*meant, *words[place + 1 :]]
    return []


def last_words(code: int) -> None:
    """Before a process that a launcher started ends with `code`: the launcher answers with a traceback of its own,
    which would be taken for ours, and with exit code 1. Nothing to say where it does not."""
    words = launcher_words() or launcher_words("torchrun")
    its = next((word for word in words if word.endswith(".py")), None)
    options = words[: words.index(its)] if its else words
    if not code or not words or "--quiet" in options or "-q" in options or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    launcher = "accelerate launch" if words[0] == "accelerate" else words[0]
    instead = f"; `python {its} ...` ends without it" if its and int(os.environ.get("WORLD_SIZE") or 1) == 1 else ""
    print(
        f"exit code {code}, for the reason above. A traceback below is that of {launcher}, which ends with 1{instead}.",
        file=sys.stderr,
        flush=True,
    )
