"""Pictures that became unreadable while the run goes on: told once each, counted, or a reason to stop."""

from utils import errors


class StandIns:
    def __init__(self):
        self.in_step = 0  # examples of the step under way, in this process, that others stand in for
        self.count = 0  # of all steps and processes
        self.fatal = False  # this process saw one that ends the run
        self._told: set[str] = set()

    def begin_step(self) -> None:
        self.in_step = 0

    def take(self, batch: dict) -> dict:
        """The batch without its `lost`: [(message, whether the run must stop), ...]."""
        for message, fatal in batch.get("lost", ()):
            self.in_step += 1
            self.fatal |= fatal
            if message not in self._told:
                self._told.add(message)
                errors.warn(message, everywhere=True)
        return {name: value for name, value in batch.items() if name != "lost"}
