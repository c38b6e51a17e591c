"""First losses of every script, written down once: a change that should not change numbers leaves them as they are."""

import importlib
import json
import shlex

import pytest

from utils import runtime

SUBJECT = "--instance_data_dir '{photos}' --instance_prompt 'a photo of sks dog'"
PRIOR = " --with_prior_preservation --class_data_dir '{classes}' --class_prompt 'a dog' --num_class_images 4"
PICTURES = "--train_data_dir '{photos}' --resolution 64 --random_flip --caption_dropout 0.2"
# With --use_pdm_loss, drawn with the untouched model before the first step.
PDM = SUBJECT + PRIOR + " --use_inst_loss --use_pdm_loss --pdm_inversion_steps 8 --resolution 64 --center_crop"
GOLDEN = {
    "train_dreambooth": ("sd1", SUBJECT + PRIOR + " --train_text_encoder", [2.3446412, 2.3474212, 1.9970429]),
    "train_dreambooth_lora": (
        "sd2",
        SUBJECT + PRIOR + " --train_text_encoder --use_dora --adam_weight_decay 0",
        [1.4435123, 1.426074, 1.056861],
    ),
    "train_dreambooth_lora_sdxl": ("sdxl", SUBJECT + PRIOR + " --train_text_encoder", [2.436198, 2.3535352, 2.1491008]),
    "train_text_to_image": ("sd1", PICTURES + " --use_ema --snr_gamma 5", [0.4897145, 0.3196834, 0.9880552]),
    "train_text_to_image_lora": ("sdxl", PICTURES + " --noise_offset 0.1", [1.1962979, 1.1942371, 1.0916297]),
    "train_pdmbooth": ("sd1", PDM, [2.3820527, 2.4017344, 2.0560369]),
    "train_pdmbooth_lora": ("sd1", PDM, [2.359242, 2.404037, 2.1122334]),
}


@pytest.mark.parametrize("script", GOLDEN)
def test_golden_first_losses(script, request, photos, class_photos, tmp_path):
    model, options, golden = GOLDEN[script]
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text(f"a photo of {photo.stem}")
    words = shlex.split(options.format(photos=photos, classes=class_photos))
    words += [
        "--pretrained_model_name_or_path",
        str(request.getfixturevalue(model)),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += shlex.split("--max_train_steps 3 --seed 3 --train_batch_size 2 --learning_rate 1e-3 --report_to none")
    module = importlib.import_module(script)
    module.main(module.parse_args(words))
    runtime.close_last()
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(golden, rel=1e-4)
