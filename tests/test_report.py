"""The report: what it shows, what it must not let through, how quickly it is built, and what a browser says to it."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from utils import report
from utils.report import curves, gallery
from utils.runtime import signals

EVIL = '<script>alert(1)</script> "sks" & <img src=x onerror=alert(2)> {{ 7 * 7 }}'
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def make_run(folder, steps=400, every=50, prompts=("a photo of sks dog on the beach", EVIL), images=4, side=128):
    """A run folder as the scripts leave it, with drawings instead of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            # Pseudo-noise that is the same everywhere, with one wild spike.
            loss = (
                0.08 + 0.25 * math.exp(-step / steps * 4) + 0.05 * math.sin(step * 12.9898) + (3 if step == 70 else 0)
            )
            row = {"step": step, "loss": loss, "lr": 1e-4 * min(1, step / 50), "grad_norm": 0.3 + 0.1 * math.cos(step)}
            file.write(json.dumps(row) + "\n")
    (folder / "training_config.yaml").write_text(
        "pretrained_model_name_or_path: toybox\ninstance_prompt: a photo of sks dog\nresolution: 64\nrank: 8\n"
        "random_flip: false\nsnr_gamma: null\nvalidation_prompt:\n- a photo of sks dog on the beach\n- '" + EVIL + "'\n"
    )
    for step in range(0, steps + 1, every):
        for p, prompt in enumerate(prompts):
            for i in range(images):
                image = Image.new("RGB", (side, side), (60 + 40 * i, 120 + 30 * p, 200 - step * 120 // steps))
                grow = side * (0.1 + 0.35 * step / steps)
                middle = side / 2
                box = (middle - grow, middle - grow, middle + grow, middle + grow)
                ImageDraw.Draw(image).ellipse(box, fill=(230, 190 - 30 * i, 90 + 60 * p))
                path = folder / "samples" / f"step-{step:06d}" / f"{p:02d}-{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                gallery.save_png(image, path, {"prompt": prompt, "seed": 7 + i})
    (folder / "checkpoint-200").mkdir(exist_ok=True)
    (folder / "checkpoint-200" / "state.json").write_text("{}")
    report.preview(Photos(side), folder)
    session = {"seconds": 4100.0, "phases": {"class images": 12.3, "training": 4000.0}, "seconds_to_first_step": 21.0}
    session |= {"median_step_seconds": 0.125, "peak_memory_gib": 3.5, "device": "cpu"}
    (folder / "timings.json").write_text(json.dumps({"sessions": [session, session]}))
    return SimpleNamespace(output_dir=str(folder), is_main=True)


class Photos:
    """Three instance photos and twenty class images, with the methods of a dataset that the report uses."""

    def __init__(self, side, masked=False):
        self.side, self.masked = side, masked
        self.instance, self.classes = ([SimpleNamespace(is_class=kind)] * n for kind, n in ((False, 3), (True, 20)))

    def __len__(self):
        return 20

    def __getitem__(self, position):
        import torch

        shade = torch.linspace(-1, 1, self.side).expand(3, self.side, self.side)
        place = position % 3
        return [
            {"pixels": shade, "captions": EVIL, "is_class": False, "keys": f"i{place}"} | self.masks(0),
            {"pixels": -shade, "captions": "a photo of dog", "is_class": True, "keys": f"c{position}"}
            | self.masks(255),
        ]

    def masks(self, shade):
        import torch

        return {"mask": torch.full((1, self.side, self.side), shade, dtype=torch.uint8)} if self.masked else {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "a dog & more")


@pytest.fixture(scope="module")
def page(run):
    return report.Report(
        run, total_steps=500, defaults={"resolution": 512, "rank": 4, "random_flip": False, "snr_gamma": None}
    ).write()


def test_page_says_what_happened(run, page):
    text = page.read_text()
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "400 of 500" in shown and "a photo of sks dog on the beach" in shown
    assert "class images" in shown and "24.6 s" in shown and "2 h 13 min" in shown
    assert "125 ms" in shown and "3.50 GiB" in shown and "21.0 s" in shown
    assert re.findall(r"<tr><td>([^<]*)</td><td class=\"amount\">([^<]*)</td>", text[text.index("<h3>Time") :])[:4] == [
        ("class images", "24.6 s"),
        ("training", "2 h 13 min"),
        ("start-up, loading and the rest", "2 min 55 s"),
        ("in all", "2 h 16 min"),  # 2 x 4100 s
    ]
    assert "3, as the network sees them" in shown and "12 of 20, as the network sees them" in shown
    assert "checkpoint-200/" in shown and "--resume_from_checkpoint latest" in shown
    # 9 validations x 2 prompts x 4 images, 3 training photos, 12 class images: every one is embedded
    assert text.count("<img src=") == 9 * 2 * 4 + 3 + 12 == text.count('src="data:image/jpeg;base64,')
    assert text.count("<svg") == 3
    assert len(text) < 1_000_000


def test_every_link_leads_to_a_file(run, page):
    from urllib.parse import unquote

    links = re.findall(r'<a href="([^"]+)"', page.read_text())
    assert len(links) > 72
    for link in links:
        assert (page.parent / unquote(html.unescape(link))).exists(), link


def test_settings_that_differ_come_first(page):
    chosen, others = page.read_text().split('<details id="others">')
    assert "<td>resolution</td>" in chosen and "<td>rank</td>" in chosen
    assert "<td>random_<wbr>flip</td>" in others and "2 at their defaults" in others
    assert report.split_settings({"a": ["x"], "b": ["x"]}, {"a": ("x",), "b": ()}) == ([("b", "x")], [("a", "x")])


def test_user_text_never_becomes_markup(page):
    text = page.read_text()
    assert "onerror=alert" in html.unescape(text)  # it is shown
    assert "<img src=x" not in text and "<script>alert" not in text
    assert html.escape("{{ 7 * 7 }}") in text  # and not evaluated
    assert text.count("<script>") == 1
    assert "default-src &#39;none&#39;" in text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)


def test_restarted_steps_count_once_and_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3, 4)]
    lines += [json.dumps({"step": s, "loss": 2.0}) for s in (3, 4, 5)] + ['{"step": 6, "lo']
    path.write_text("\n".join(lines))
    steps, values, _ = curves.series(curves.read_metrics(path), "loss")
    assert steps == [1, 2, 3, 4, 5] and values == [1, 1, 2, 2, 2]


def test_non_finite_values_are_counted_not_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": "inf"}\n')
    text = report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).build()
    assert "2 values were not finite" in text and "nan" not in re.search("<svg.*?</svg>", text, re.DOTALL)[0].lower()


def test_the_parts_of_the_loss_have_curves_beside_it(tmp_path):
    rows = [{"step": s, "loss": 3.0, "loss_instance": 1.0, "loss_pdm": 20.0, "grad_norm": 1.0} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({**row, "lr": 1e-4}) for row in rows))
    text = report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).build()
    charts = re.findall('<svg.*?aria-label="(.*?)".*?<title>step 1: raw (.*?),', text)
    assert charts == [("Loss", "3"), ("Loss of the photos", "1"), ("Loss of queries", "20")] + charts[3:]


def test_thinning_keeps_spikes_and_ends():
    steps = list(range(10_000))
    values = [0.1] * 10_000
    values[1234], values[-1] = 9.0, 0.2
    kept_steps, kept = curves.thin(steps, values, 100)
    assert len(kept) <= 2 * 100 + 2 and max(kept) == 9.0
    assert (kept_steps[0], kept_steps[-1]) == (0, 9999) and kept_steps == sorted(kept_steps)


@pytest.mark.parametrize("low, high", [(0, 1), (0.08, 0.31), (1e-6, 3e-6), (-5, 12), (0, 15000)])
def test_ticks_are_round_and_inside(low, high):
    marks = curves.ticks(low, high, 4)
    assert 3 <= len(marks) <= 10 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)


def axis(svg):
    """The lowest and the highest number beside the axis of values, by their places, at its two ends."""
    marks = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.,-]+)<', svg)
    (bottom, low), (top, high) = [(float(y) - 4.5, float(value)) for y, value in (marks[0], marks[-1])]
    scale = (high - low) / (bottom - top)
    ends = (curves.HEIGHT - curves.BOTTOM, curves.TOP)
    return [round(low + (bottom - end) * scale, 2) for end in ends]


@pytest.mark.parametrize(
    "values, ends",
    [([1, 1], [0.5, 1]), ([0, 0], [0, 0.5]), ([0.4, 1], [0.36, 1]), ([0.8], [0.4, 1]), ([0.9, 1.1], [0.89, 1.11])],
)
def test_the_axis_of_shares_ends_at_one(values, ends):
    lines = [("judge_i", list(range(len(values))), values, "main")]
    assert axis(curves.chart("Likeness", lines, shares=True)) == ends
    low, high = axis(curves.chart("Loss", lines))
    assert low < ends[0] or high > ends[1] or ends == [0.89, 1.11]


def test_a_page_of_ten_thousand_lines_is_built_at_once(tmp_path):
    run = make_run(tmp_path / "long", steps=10_000, every=1000, images=2, side=64)
    made = report.Report(run)
    made.build()  # reads the pictures once; a validation adds only its own
    start = time.process_time()
    text = made.build()
    assert time.process_time() - start < 0.3
    assert len(text) < 600_000


def test_many_validations_keep_the_first_and_the_newest(tmp_path):
    run = make_run(tmp_path / "many", steps=600, every=10, images=1, side=32, prompts=("x",))
    text = report.Report(run).build()
    shown = re.findall(r'class="when">step (\d+)', text)
    assert len(shown) == report.MOST_STEPS and shown[0] == "0" and shown[-1] == "600"
    assert "20 of 61 validations" in text


def test_prompts_stand_side_by_side_and_pictures_of_one_step_in_a_row(tmp_path):
    def halves():
        return report.Report(made).build().split("<h2>Test images</h2>")

    made = make_run(tmp_path, steps=100, every=50)
    shutil.copytree(tmp_path / "samples" / "step-000100", tmp_path / "test_samples" / "step-000100")
    samples, tests = halves()
    assert samples.count('<div class="prompts">') == tests.count('<div class="prompts">') == 1
    assert samples.count('<div class="column">') == 2 * 3 and 'class="column row"' not in samples
    assert tests.count('<div class="column row">') == 2 and 'class="card wide"' not in samples
    make_run(tmp_path, steps=250, every=50)
    assert halves()[0].count('<div class="card wide">') == 2, "six steps need the width"


def test_pictures_of_a_course_that_was_left_are_not_shown(tmp_path):
    """Back at step 200: what stands at 250 and later was drawn by other weights."""
    run = make_run(tmp_path / "run", images=1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:200]))
    page = report.Report(run, 400).build()
    assert "samples/step-000200/" in page and "samples/step-000250/" not in page
    run.step = 260  # a validation comes before the line of its step when not every step is told
    page = report.Report(run, 400).build()
    assert "samples/step-000250/" in page and "samples/step-000300/" not in page


def test_the_session_that_goes_on_counts_once(tmp_path):
    import torch

    from utils.runtime import progress

    run = SimpleNamespace(output_dir=str(tmp_path), is_main=True, device=torch.device("cpu"), session={"began": "now"})
    run.clock, run.total = progress.Clock(), 50
    run.clock.phases["sample images"] = 40.0
    earlier = [{"began": began, "seconds": 60, "phases": {"sample images": 30.0}} for began in ("before", "now")]
    (tmp_path / "timings.json").write_text(json.dumps({"sessions": earlier}))
    text = report.Report(run).build()
    assert "70.0 s" in text and "0 of 50" in text


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "<h1>" in report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).write().read_text()


def test_other_processes_write_nothing(tmp_path):
    assert report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=False)).write() is None
    assert not list(tmp_path.iterdir())


def test_a_broken_picture_is_left_out_and_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", steps=100, images=1)
    made = report.Report(run)
    first = made.write().read_bytes()
    (tmp_path / "run/samples/step-000100/00-00.png").write_bytes(b"\x89PNG cut")
    assert made.build().count("<img src=") == first.decode().count("<img src=") - 1

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(gallery.os, "replace", fail)
    assert made.write() is None  # and the training goes on
    assert "not written (disk full)" in capsys.readouterr().err
    assert (tmp_path / "run/report.html").read_bytes() == first
    assert not list((tmp_path / "run").glob(".report*"))


def test_resume_command_carries_no_secret(monkeypatch):
    monkeypatch.setattr(signals, "launcher_words", lambda name="accelerate": [])
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_abc", "--rank=4", "--instance_prompt", "a dog"])
    assert (
        report.command_again() == "python train.py --rank=4 --instance_prompt 'a dog' --resume_from_checkpoint latest"
    )
    monkeypatch.setattr(
        sys, "argv", ["t.py", "--hub_token=hf_abc", "--resume_from_checkpoint=latest", "--overwrite_output_dir"]
    )
    assert report.command_again() == "python t.py --resume_from_checkpoint latest"
    monkeypatch.setattr(sys, "argv", ["t.py", "--overwrite_output_dir", "yes", "--rank", "4"])
    assert report.command_again() == "python t.py --rank 4 --resume_from_checkpoint latest"
    for launcher in (["accelerate", "launch", "--num_processes", "1"], ["torchrun", "--nproc_per_node", "2"]):
        words = [*launcher, "t.py", "--hub_token", "hf_abc", "-x"]
        monkeypatch.setattr(signals, "launcher_words", lambda name="accelerate", w=words: w if w[0] == name else [])
        assert report.command_again() == " ".join([*launcher, "t.py", "-x", "--resume_from_checkpoint", "latest"])


def test_photos_are_shown_as_the_network_sees_them(photos, class_photos, tmp_path):
    from utils import datasets

    dataset = datasets.DreamBooth(
        datasets.folder(photos, "a photo of sks dog"),
        datasets.folder(class_photos, "a dog", is_class=True),
        size=32,
        seed=3,
    )
    first = dataset[0][0]
    cached = dataset.latents = object()  # once latents are cached the records themselves show no pixels
    report.preview(dataset, tmp_path)
    assert dataset.latents is cached
    listed = json.loads((tmp_path / "preview/preview.json").read_text())
    assert [entry["is_class"] for entry in listed["images"]].count(False) == 3 == listed["instance_count"]
    assert [entry["is_class"] for entry in listed["images"]].count(True) == 4 == listed["class_count"]
    with Image.open(tmp_path / "preview" / listed["images"][0]["file"]) as image:
        shown = [value / 127.5 - 1 for value in image.getpixel((5, 9))]
    assert shown == pytest.approx(first["pixels"][:, 9, 5].tolist(), abs=0.005)
    assert listed["images"][0]["caption"] == "a photo of sks dog"
    assert report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).build().count("<img src=") == 7


def test_a_red_veil_is_explained_where_there_is_one(tmp_path):
    for masked in (False, True):
        report.preview(Photos(32, masked), tmp_path)
        page = report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).build()
        told = re.findall("All 3, as|12 of 20, as|mask leaves out is tinted red", page)
        assert told == ["All 3, as", *["mask leaves out is tinted red"] * masked, "12 of 20, as"]


def test_the_contact_sheet_shows_crop_caption_and_tokens(tmp_path):
    from utils import datasets, sheets

    source = tmp_path / "photos" / "wide.png"
    source.parent.mkdir()
    Image.new("RGB", (300, 100), (0, 0, 250)).save(source)
    dataset = datasets.DreamBooth(datasets.folder(source.parent, EVIL), size=100, center_crop=True)
    told = []
    report.contact_sheet(dataset, tmp_path, lambda text: told.append(text) or 99, 77)
    assert told == [EVIL]
    with Image.open(tmp_path / "data_preview.png") as image:
        sheet = image.convert("RGB")
    colours = {colour: count for count, colour in sheet.getcolors(2**20)}
    inside, outside = (
        colours.get((0, 0, 250), 0),
        sum(n for (r, g, b), n in colours.items() if 170 < r < 185 and b > 250),
    )
    assert inside and 1.5 * inside < outside < 2.5 * inside, "a third of the photo is the crop"
    assert (192, 0, 0) in colours, "more tokens than the model reads are red"
    report.contact_sheet(dataset, tmp_path, lambda text: 9, 77)
    with Image.open(tmp_path / "data_preview.png") as image:
        assert (192, 0, 0) not in [colour for _, colour in image.convert("RGB").getcolors(2**20)]
    page = report.Report(SimpleNamespace(output_dir=str(tmp_path), is_main=True)).build()
    assert page.count('<a href="data_preview.png"><img src="data:image/jpeg;base64,') == 1
    square = Image.new("RGB", (8, 8))
    assert sheets.lit(square, 0, 0, (8, 8)) is square, "where nothing is cut off nothing is drawn"


def test_importing_the_report_loads_nothing_heavy():
    heavy = ("torch", "diffusers", "jinja2", "PIL", "yaml")
    code = f"import sys; from utils import report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def browse(tmp_path, *arguments):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the report was NOT opened in a browser (apt-get install chromium)")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr
        --virtual-time-budget=4000"""
    flags = [*flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, complaints


CHECK = """
const all = [...document.images];
document.body.dataset.pictures = all.length;
document.body.dataset.broken = all.filter(p => !(p.complete && p.naturalWidth > 0)).length;
document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
find.value = "rank"; find.dispatchEvent(new Event("input"));
document.body.dataset.rows = [...document.querySelectorAll(".settings tr")].filter(r => !r.hidden).length;
document.body.dataset.styled = getComputedStyle(document.querySelector(".card")).borderRadius;
"""


@pytest.mark.browser
def test_a_browser_shows_every_picture_and_complains_about_nothing(run, page, tmp_path):
    """The page's policy stays in force: the check is let in by its hash, and one more script, not named, is not."""
    allowed = base64.b64encode(hashlib.sha256(CHECK.encode()).digest()).decode()
    text = page.read_text().replace("script-src &#39;", f"script-src &#39;sha256-{allowed}&#39; &#39;")
    checked = tmp_path / "checked.html"
    checked.write_text(text.replace("</body>", f"<script>{CHECK}</script></body>"))
    dom, complaints = browse(tmp_path, "--dump-dom", checked.as_uri())
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search("<body[^>]*>", dom)[0]))
    assert told == {"pictures": "87", "broken": "0", "wide": "0", "rows": "1", "styled": "10px"}
    assert complaints == []

    checked.write_text(page.read_text().replace("</body>", "<script>document.title = 'let in'</script></body>"))
    dom, complaints = browse(tmp_path, "--dump-dom", checked.as_uri())
    assert "<title>let in" not in dom and len(complaints) == 1 and "Content Security Policy" in complaints[0]


@pytest.mark.browser
def test_screenshots_on_a_desk_and_on_a_phone(page, tmp_path):
    """Both can be looked at afterwards; here only: no complaint, and a picture that is not empty."""
    for name, width in (("desk", 1200), ("phone", 400)):
        frame = tmp_path / f"{name}.html"  # a frame, because a window may refuse to be as narrow as a phone
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.as_uri()}" width={width} height=2400 frameborder=0>'
        )
        shot = tmp_path / f"{name}.png"
        _, complaints = browse(
            tmp_path, f"--screenshot={shot}", f"--window-size={max(width, 500)},2400", frame.as_uri()
        )
        assert complaints == []
        with Image.open(shot) as image:
            colours = image.convert("RGB").crop((0, 0, width, 2400)).getcolors(maxcolors=1 << 24)
        assert len(colours) > 500
