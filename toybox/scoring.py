"""The toybox's judge as one of the judges of `--scores`; the configuration in toybox/judge names it."""

import torch

from toybox.draw import SCENES
from toybox.judge import Judge, as_pixels
from toybox.style import Palette
from utils import scores


class Scoring(scores.Network):
    """It has no words, but recognises whether the thing and the scene of a prompt are there."""

    def __init__(self, device="cpu"):
        super().__init__("judge", device)

    def load(self):
        self.judge = Judge.load()
        return self.judge.network

    def embed(self, pictures):
        return self.network(as_pixels(pictures).to(self.device))[1]

    def learn(self, taught):
        return Palette(taught)  # the network learned to overlook how things are drawn

    def style(self, seen, pictures, learned):
        return learned.likeness(pictures)

    def obeyed(self, seen, pictures, prompts):
        logits, _ = self.network(as_pixels(pictures).to(self.device))
        shown = {head: [self.judge.names[head][k] for k in rows.argmax(1).tolist()] for head, rows in logits.items()}
        phrases = {(head, word): word for head in ("thing", "colour", "pattern") for word in self.judge.names[head]}
        phrases |= {("scene", scene): phrase for scene, phrase in SCENES.items()}
        right = []
        for number, prompt in enumerate(prompts):
            asked = [shown[head][number] == word for (head, word), text in phrases.items() if _said(text, prompt)]
            right.append(float(all(asked)) if asked else float("nan"))  # nothing in it that the judge knows
        return torch.tensor(right)


def _said(phrase: str, prompt: str) -> bool:
    return f" {phrase} " in f" {' '.join(scores.words(prompt))} "
