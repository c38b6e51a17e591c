"""TensorBoard, Weights & Biases and their like, through accelerate. A failing tracker costs a warning."""

import contextlib
import os

from utils import errors
from utils.runtime import startup

# By itself wandb records the command line (folders of photos among it), the git remote, the host name and the source.
WANDB_PRIVATE = {"disable_git": True, "x_disable_meta": True, "x_disable_machine_info": True, "save_code": False}
WANDB_PRIVATE |= {"host": "not recorded"}


class Trackers:
    def __init__(self, accelerator, project: str, wandb_exp: str | None = None, wandb_dir: str | None = None):
        self.accelerator, self.project = accelerator, project
        self.wandb_exp, self.wandb_dir = wandb_exp, wandb_dir
        self.active, self.started = [], False

    def start(self, config: dict) -> None:
        """Once, when there is something to tell: a run that fails before it leaves no trace there."""
        if self.accelerator.log_with and self.accelerator.is_main_process and not self.started:
            self.started = True
            with self._trouble("trackers"):
                options = {"wandb": self._wandb()} if "wandb" in map(str, self.accelerator.log_with) else {}
                self.accelerator.init_trackers(self.project, startup.for_trackers(config), options)
                self.active = list(self.accelerator.trackers)

    def log(self, values: dict, step: int) -> None:
        for tracker in list(self.active):
            with self._trouble(tracker.name, tracker):
                tracker.log(values, step=step)

    def log_images(self, images: dict[str, list], step: int) -> None:
        """name -> PIL images of one size."""
        for tracker in list(self.active):
            with self._trouble(tracker.name, tracker):
                if tracker.name == "tensorboard":
                    import numpy

                    for name, pictures in images.items():
                        stack = numpy.stack([numpy.asarray(picture.convert("RGB")) for picture in pictures])
                        tracker.writer.add_images(name, stack, global_step=step, dataformats="NHWC")
                    tracker.writer.flush()
                elif hasattr(tracker, "log_images"):
                    tracker.log_images(images, step=step)

    def close(self) -> None:
        for tracker in self.active:
            with self._trouble(tracker.name):
                tracker.finish()
        self.active = []

    def _wandb(self) -> dict:
        """Its files go where other trackers' go, not into the folder that the run was started from; what it would
        record of the machine stays here unless its variable (WANDB_DISABLE_GIT=false, ...) asks for it."""
        kept = {name: value for name, value in WANDB_PRIVATE.items() if f"WANDB_{name}".upper() not in os.environ}
        named = {"settings": kept} | ({"name": self.wandb_exp} if self.wandb_exp else {})
        if os.environ.get("WANDB_DIR") and not self.wandb_dir:
            return named
        folder = self.wandb_dir or self.accelerator.logging_dir
        os.makedirs(folder, exist_ok=True)
        return named | {"dir": folder}

    @contextlib.contextmanager
    def _trouble(self, name: str, tracker=None):
        try:
            yield
        except Exception as problem:
            if tracker in self.active:
                self.active.remove(tracker)
            errors.warn(f"--report_to {name}: {errors.without_secrets(str(problem))}; training goes on without it.")
