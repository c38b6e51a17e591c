"""report.html: what a run was told, how it went and what it draws, on one page that opens from disk without network.

The page is built from files alone (metrics.jsonl, training_config.yaml, samples/, preview/), so it can be rebuilt at
any time and after any kill. Small copies of the pictures are embedded, which keeps the page whole when it is moved or
mailed (about 10 kB a picture, at most `MOST_STEPS` validations a prompt); each links to the full picture beside it.
What a user wrote is escaped by the template, and the page's policy allows no script, style or address but its own.
"""

import base64
import functools
import hashlib
import json
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import quote

from utils import divergence, errors, scores, strict, writing
from utils.report import curves, gallery

MOST_STEPS = 20  # validations shown for each prompt: the first, the newest, and evenly between
WHOLE = (1040, 4000)  # pixels: the contact sheet is embedded as large as it is
PARTS = {"loss_instance": "Loss of the photos", "loss_prior": "Loss of the class images", "loss_pdm": "Loss of queries"}
STROKES = ("main", "second", "third")
preview = gallery.preview  # report.preview(dataset, output_dir): the photos as the network sees them
contact_sheet = gallery.contact_sheet  # report.contact_sheet(dataset, output_dir, ...): data_preview.png


class Report:
    """Call `write()` at each validation and at the end. Only the main process writes; the others return at once."""

    def __init__(
        self,
        run,
        total_steps: int | None = None,
        defaults: dict | None = None,  # option -> default; what differs is shown first
        resume_command: str | None = None,  # default: this command again, with --resume_from_checkpoint latest
        title: str | None = None,
    ):
        self.run, self.total_steps, self.defaults = run, total_steps, defaults
        self.folder = Path(run.output_dir)
        self.resume_command = resume_command or command_again()
        self.title = title or self.folder.resolve().name
        self.copies = {}  # picture file -> (its time and size, small copy): each picture is read once

    def write(self) -> Path | None:
        """Rebuild the page and put it in place in one step, so that a reader never meets half of it."""
        if not getattr(self.run, "is_main", True):
            return None
        target = self.folder / "report.html"
        try:
            writing.write(target, self.build())
        except OSError as problem:  # a full disk: the training is worth more than the page about it
            errors.warn(f"{target}: not written ({problem.strerror or problem}); training goes on")
            return None
        return target

    def build(self) -> str:
        rows = curves.read_metrics(self.folder / "metrics.jsonl")
        settings = read_settings(self.folder)
        step = rows[-1]["step"] if rows else 0
        last = max(step, getattr(self.run, "step", 0))
        prompts, shown, left_out = self._samples(last)
        chosen, others = split_settings(settings, self.defaults)
        sessions = _sessions(self.run, self.folder)
        total = self.total_steps or getattr(self.run, "total", None)
        template, policy = _template()
        return template.render(
            policy=policy,
            title=self.title,
            subtitle=_subtitle(settings),
            step=step,
            total=total,
            alarm=str(course) if (course := divergence.of(rows)).diverged else None,
            tiles=_tiles(rows, step, total, sessions),
            charts=_charts(rows),
            prompts=prompts,
            tests=self._samples(last, "test_samples")[0],
            shown=shown,
            left_out=left_out,
            previews=self._previews(),
            sheet=self._copy(self.folder / gallery.SHEET, WHOLE),
            chosen=chosen,
            others=others,
            tables=[table for table in (_judged(rows), _timings(sessions), _written(self.folder)) if table[1]],
            resume=self.resume_command if any(self.folder.glob("checkpoint-*")) else None,
        )

    def _samples(self, last: int, folder: str = "samples") -> tuple[list[dict], int, int]:
        """One strip per prompt; columns are steps, rows are seeds."""
        # Not those past the last step: a run that went back to an older checkpoint has not drawn them.
        found = {step: files for step, files in gallery.sample_files(self.folder, folder).items() if step <= last}
        steps = _spread(sorted(found), MOST_STEPS)
        strips = {}
        for step in steps:
            for (prompt, _), path in sorted(found[step].items()):
                small = self._copy(path)
                if small is None:
                    continue
                told = small["settings"]
                # Keyed by the text too: after a resume with other prompts, strip 0 would mix two of them.
                strip = strips.setdefault((prompt, told.get("prompt") or f"Prompt {prompt + 1}"), {})
                note = f", seed {told['seed']}" if "seed" in told else ""
                link = quote(path.relative_to(self.folder).as_posix())
                strip.setdefault(step, []).append({**small, "note": note, "link": link})
        prompts = [
            {"text": text, "columns": [{"step": curves.number(s), "images": strip[s]} for s in sorted(strip)]}
            for (_, text), strip in sorted(strips.items())
        ]
        return prompts, len(steps), len(found) - len(steps)

    def _previews(self) -> list[tuple[str, str, list[dict]]]:
        """The training photos and the class images, as `preview` left them."""
        try:
            listed = json.loads((self.folder / gallery.PREVIEW / "preview.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        sections = []
        for is_class, heading in ((False, "Training photos"), (True, "Class images")):
            chosen = [entry for entry in listed["images"] if entry["is_class"] == is_class]
            copies = [(self._copy(self.folder / gallery.PREVIEW / entry["file"]), entry["caption"]) for entry in chosen]
            photos = [{**small, "caption": caption} for small, caption in copies if small]
            count = listed["class_count" if is_class else "instance_count"]
            if photos:
                some = f"{len(photos)} of {count}" if count > len(photos) else f"All {count}"
                remark = f"{some}, as the network sees them: cropped, resized, with the caption each is trained on."
                if any(entry.get("masked") for entry in chosen):
                    remark += " What a mask leaves out is tinted red here."
                sections.append((heading, remark, photos))
        return sections

    def _copy(self, path: Path, box=(gallery.SIDE, gallery.SIDE)) -> dict | None:
        """A small JPEG of a picture as a data URI, with the settings in its file; read again only if it changed."""
        try:
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self.copies.get(path, (None,))[0] != state:
                self.copies[path] = (state, gallery.small_copy(path, box))
        except (OSError, ValueError):  # still being written by somebody, or cut: leave it out of this page
            return None
        return self.copies[path][1]


def read_settings(folder: Path) -> dict:
    try:
        settings = strict.yaml((Path(folder) / "training_config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def split_settings(settings: dict, defaults: dict | None) -> tuple[list, list]:
    """Rows of (name, text): first what differs from its default, then the rest."""
    rows = {"chosen": [], "others": []}
    for name, value in settings.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
        # Lists are written as lists, whatever the default was.
        default = (defaults or {}).get(name)
        default = list(default) if isinstance(default, tuple) else default
        same = value == default if name in (defaults or {}) else value in (None, False, [])
        rows["others" if same else "chosen"].append((name, text))
    return rows["chosen"], rows["others"]


def command_again() -> str:
    """The command that started this process, launcher included and without any secret, asking to resume."""
    from utils.runtime import signals  # which brings torch along: only a run needs it

    words = signals.launcher_words() or signals.launcher_words("torchrun") or ["python", *sys.argv]
    kept, skip = [], False
    for word in words:
        name = word.split("=")[0]
        if name in ("--hub_token", "--resume_from_checkpoint", "--resume_from_ckpt", "--overwrite_output_dir"):
            skip = "=" not in word
            continue
        if not skip or word.startswith("--"):  # a switch may stand without a value
            kept.append(word)
        skip = False
    return shlex.join([*kept, "--resume_from_checkpoint", "latest"])


@functools.lru_cache(maxsize=1)
def _template():
    """The page's template, and a policy that names its one style and its one script by their hashes."""
    import jinja2

    source = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; " + "; ".join(
        f"{tag}-src 'sha256-{value}'" for tag, value in hashes.items()
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source), policy


def _spread(steps: list[int], most: int) -> list[int]:
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _charts(rows: list[dict]) -> list[dict]:
    """Loss and its parts first, then learning rates on one axis, then whatever else was logged."""
    from markupsafe import Markup

    every = curves.names(rows)
    rates = [
        name for name in every if re.match(r"(lr|learning_rate)\b", name.replace("_", " ")) or name.endswith("_lr")
    ]
    titles = {
        "against_zero": "Loss, as a multiple of that of predicting zeros",
        "grad_norm": "Gradient norm",
        "seconds": "Seconds a step",
    }
    every = [name for name in every if not name.startswith("test_")]  # told once, in a table
    judged = scores.meanings(every)
    groups = [("Loss", ["loss"]), *((text, [name]) for name, text in PARTS.items()), ("Learning rate", rates[:3])]
    for text in dict.fromkeys(judged.values()):
        groups.append((text.capitalize(), [name for name in judged if judged[name] == text]))
    known = {"skipped", "spike", *(name for _, names in groups for name in names), *rates}
    groups += [(titles.get(name, name.replace("_", " ").capitalize()), [name]) for name in every if name not in known]
    charts = []
    for title, names in groups:
        lines, lost = [], 0
        for name, stroke in zip(names, STROKES):
            steps, values, gone = curves.series(rows, name)
            lost += gone
            if title == "Learning rate" or name.startswith("validation") or name in judged:  # no chance in these
                lines.append((name, steps, values, stroke))
            else:
                window = curves.window_for(len(values))
                smoothed = curves.smooth(values, window)
                lines += [("raw", steps, values, "raw"), (f"mean of about {window}", steps, smoothed, "main")]
        svg = curves.chart(title, lines, crop_spikes=title != "Learning rate", shares=bool(judged.keys() & names))
        if svg:
            legend = [(line[0], line[3]) for line in lines]
            charts.append({"title": title, "svg": Markup(svg), "legend": legend, "lost": lost})
    return charts


def _subtitle(settings: dict) -> str:
    several = settings.get("concepts_list")
    prompts = [str(one.get("instance_prompt")) for one in several or () if isinstance(one, dict)]
    parts = [
        settings.get("pretrained_model_name_or_path"),
        " + ".join(prompts)
        or settings.get("instance_prompt")
        or settings.get("dataset_name")
        or settings.get("train_data_dir"),
        f"written {time.strftime('%Y-%m-%d %H:%M')}",
    ]
    return " · ".join(str(part) for part in parts if part)


def _sessions(run, folder: Path) -> list[dict]:
    """Time and memory of every session: those that ended, from timings.json, and the one that is going on."""
    try:
        sessions = json.loads((folder / "timings.json").read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    if clock := getattr(run, "clock", None):
        began = run.session.get("began")
        sessions = [s for s in sessions if s.get("began") != began] + [run.session | clock.summary(run.device)]
    return sessions


def _tiles(rows: list[dict], step, total, sessions: list[dict]) -> list[tuple[str, str]]:
    """The few numbers one looks for first."""
    tiles = [("steps", f"{step:,} of {total:,}" if total else f"{step:,}")]
    _, losses, _ = curves.series(rows, "loss")
    if losses:
        tiles.append(
            (f"smoothed loss (mean of about {curves.STEADY} steps)", curves.number(curves.smoothed_end(losses)))
        )
    spikes, _, _ = curves.series(rows, "spike")
    if spikes:
        tiles.append(
            ("loss spikes", f"{len(spikes)}, at step {', '.join(map(str, spikes[:3]))}{' …' * bool(spikes[3:])}")
        )
    if sessions:
        tiles.append(("in all", duration(sum(s.get("seconds", 0) for s in sessions))))
        if first := sessions[-1].get("seconds_to_first_step"):
            tiles.append(("until the first step was done", duration(first)))
        if pace := sessions[-1].get("median_step_seconds"):
            tiles.append(("median step", f"{pace * 1000:.0f} ms" if pace < 1 else f"{pace:.2f} s"))
        if peak := max(s.get("peak_memory_gib") or 0 for s in sessions):
            of = "memory" if sessions[-1].get("device") == "cpu" else "GPU memory"
            tiles.append((f"peak {of}", f"{peak:.2f} GiB"))
    return tiles


def _judged(rows: list[dict]) -> tuple[str, list]:
    """The first and the last of every score."""
    told = []
    for name, meaning in scores.meanings(curves.names(rows)).items():
        values = curves.series(rows, name)[1]
        came_to = " to ".join(f"{value:.3f}" for value in dict.fromkeys((values[0], values[-1])))
        told.append((f"{name}: {meaning}", came_to, None))
    return "Scores", told


def _timings(sessions: list[dict]) -> tuple[str, list]:
    """Where the time went, all sessions together: rows that add up to the last."""
    phases, total = {}, sum(session.get("seconds", 0) for session in sessions)
    for session in sessions:
        for name, seconds in session.get("phases", {}).items():
            phases[name] = phases.get(name, 0) + seconds
    phases["start-up, loading and the rest"] = max(total - sum(phases.values()), 0)
    rows = [(name, duration(seconds), None) for name, seconds in (*phases.items(), ("in all", total))]
    return "Time", rows if sessions else []


def _written(folder: Path) -> tuple[str, list]:
    """What stands in the output folder, with sizes; hidden and staged files are nobody's business."""
    rows = []
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.name.startswith("."):
            continue
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        try:
            size = sum(file.stat().st_size for file in files)
        except OSError:  # being rotated away at this moment
            continue
        rows.append((path.name + ("/" if path.is_dir() else ""), amount(size), quote(path.name)))
    return "What was written", rows


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
