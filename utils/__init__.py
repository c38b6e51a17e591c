"""One package for all scripts; the first thing that it does is to answer signals."""

from utils import interrupts

interrupts.from_the_start()
