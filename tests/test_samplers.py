"""Every sampler that is offered, against the noise schedule that it is to draw."""

import inspect
import shutil

import pytest
import torch
from test_infer import draw, make_lora, refused
from test_scripts import VALIDATE, train  # noqa: F401 - train is a fixture

from utils import samplers, saved

CLEAN = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def own(rescaled=True):
    """The scheduler of a model that was trained with --rescale_betas_zero_snr."""
    from diffusers import DDIMScheduler

    trained = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": rescaled}
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **trained
    )


def follows(scheduler, alphas) -> bool:
    """Whether a network that answers as that schedule asks leads to the clean image, through every noise level."""
    scheduler.set_timesteps(25)
    x = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    more = {"generator": torch.Generator().manual_seed(2)} if _draws(scheduler) else {}
    for t in scheduler.timesteps:
        known = torch.arange(len(alphas), dtype=torch.float64)
        low, share = int(t), float(t) - int(t)
        alpha = alphas[low] if not share else alphas[low] * (1 - share) + alphas[low + 1] * share
        assert 0 <= low < len(known)
        seen = scheduler.scale_model_input(x, t)
        velocity = (alpha.sqrt() * seen - CLEAN) / (1 - alpha).sqrt()  # v = √ᾱ ε - √(1-ᾱ) x0, ε from x_t
        x = scheduler.step(velocity, t, x, **more).prev_sample
    same = torch.allclose(torch.as_tensor(scheduler.alphas_cumprod).float(), alphas, atol=1e-6)
    return same and scheduler.timesteps[0] == 999 and torch.allclose(x, CLEAN, atol=1e-3)


def _draws(scheduler):
    return "generator" in inspect.signature(scheduler.step).parameters


@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name != "lms"])
def test_each_sampler_draws_a_schedule_that_ends_in_noise_or_is_refused(name):
    import diffusers

    config, (kind, changes) = own().config, samplers.SAMPLERS[name]
    alphas = own().alphas_cumprod
    complaint = samplers.misfit(name, config, "--scheduler")
    assert (complaint is not None) == (name in samplers.NOT_ZERO_SNR)
    if complaint:
        assert complaint.startswith(f"--scheduler {name} cannot") and "ddim, ddpm, dpm++, " in complaint
        with pytest.raises(SystemExit):
            samplers.make(kind, config, changes)
        try:  # the refusal is needed
            wrong = getattr(diffusers, kind).from_config({**config, **changes})
            assert not follows(wrong, alphas)
        except IndexError:
            pass
        assert samplers.misfit(name, own(rescaled=False).config, "--scheduler") is None
        return
    scheduler = samplers.make(kind, config, changes)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert follows(scheduler, alphas)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "lms", "DEISMultistepScheduler", "PNDMScheduler"])
def test_class_names_are_refused_like_short_names(name):
    complaint = samplers.misfit(name, {"rescale_betas_zero_snr": True}, "--scheduler")
    assert f"{name} cannot draw" in complaint
    assert ("DDIMScheduler, DDPMScheduler" in complaint) == name.endswith("Scheduler")


def test_lms_without_scipy_names_the_package(monkeypatch):
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    assert samplers.misfit("lms", {}, "--scheduler") == "--scheduler lms needs scipy: pip install scipy"
    assert samplers.misfit("heun", {}, "--scheduler") is None


def test_edm_models_refuse_the_others():
    edm = {"_class_name": "EDMEulerScheduler"}
    for name, (kind, _) in samplers.SAMPLERS.items():
        assert bool(samplers.misfit(name, edm, "--scheduler")) == (kind not in samplers.EDM_TWINS), name
    assert "use dpm++, " in samplers.misfit("ddim", edm, "--scheduler")
    assert samplers.misfit("model", edm, "--scheduler") is None


def test_infer_refuses_before_it_loads(sd1, sd2, tmp_path, capsys, monkeypatch):
    from utils import assembling

    monkeypatch.setattr(assembling, "pipeline", None)  # nothing is loaded
    rescaled = tmp_path / "rescaled"
    shutil.copytree(sd2, rescaled)
    own().save_config(rescaled / "scheduler")
    dog = ["--prompt", "dog", "--output_dir", tmp_path / "out"]
    assert "zero terminal SNR" in refused(
        capsys, "--pretrained_model_name_or_path", rescaled, "--scheduler", "deis", *dog
    )
    run = make_lora(sd2, tmp_path / "run")
    (run / "training_config.yaml").write_text(
        f"pretrained_model_name_or_path: {sd2}\nrescale_betas_zero_snr: true\nprediction_type: null\n"
    )
    assert "--scheduler heun cannot draw" in refused(capsys, "--lora", run, "--scheduler", "heun", *dog)
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    assert "pip install scipy" in refused(capsys, "--pretrained_model_name_or_path", sd1, "--scheduler", "lms", *dog)


def test_a_rescaled_run_draws_with_the_others(sd2, tmp_path):
    run = make_lora(sd2, tmp_path / "run")
    (run / "training_config.yaml").write_text(
        f"pretrained_model_name_or_path: {sd2}\nrescale_betas_zero_snr: true\nprediction_type: null\n"
    )
    assert (run / saved.LORA_FILE).is_file()
    for name in ("model", "unipc"):
        more = ["--num_images", 1, "--num_inference_steps", 3, "--scheduler", name]
        assert draw(tmp_path / name, "--lora", run, "--prompt", "dog", *more)


def test_a_model_with_karras_levels_is_drawn_without_them(sd2, tmp_path):
    """With them diffusers fails at the last step: see `samplers.NOT_ZERO_SNR`."""
    from diffusers import DPMSolverMultistepScheduler

    from utils import models

    folder = tmp_path / "karras"
    shutil.copytree(sd2, folder)
    DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True).save_config(
        folder / "scheduler"
    )
    index = (folder / "model_index.json").read_text()
    for kind in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"):
        index = index.replace(kind, "DPMSolverMultistepScheduler")
    (folder / "model_index.json").write_text(index)
    family = models.family_of(str(folder), rescale_betas_zero_snr=True)
    family.load("cpu", torch.float32)
    assert follows(
        samplers.make("DPMSolverMultistepScheduler", family.own_scheduler.config), family.scheduler.alphas_cumprod
    )


def test_training_refuses_a_sampler_before_it_loads(train, tmp_path, capsys):  # noqa: F811
    import tiny
    from diffusers import EDMEulerScheduler

    pipeline = tiny.stable_diffusion()
    pipeline.scheduler = EDMEulerScheduler()
    edm = tiny.save(pipeline, tmp_path / "edm")
    options = "--max_train_steps 1 --validation_scheduler DDPMScheduler --dry_run"
    with pytest.raises(SystemExit) as stopped:
        train("train_dreambooth_lora", f"{options} {VALIDATE}", "no", model=edm)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--validation_scheduler DDPMScheduler cannot draw" in said
    assert "DPMSolverMultistepScheduler, EulerDiscreteScheduler" in said
    train("train_dreambooth_lora", options, "yes", model=edm)  # no images, no sampler


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name != "lms"])
def test_no_sampler_clips_latents_where_the_models_scheduler_does_not_say(name, rescaled):
    """Saved PNDM, whose class has no such entry: DDIM and DDPM made from it would clip x0 to [-1, 1]."""
    from diffusers import PNDMScheduler

    from utils.models.stable_diffusion import StableDiffusion

    family = StableDiffusion("toybox", prediction_type="v_prediction", rescale_betas_zero_snr=rescaled)
    scheduler = family._as_trained(PNDMScheduler(skip_prk_steps=True))
    kind, changes = samplers.SAMPLERS[name]
    if not samplers.misfit(name, scheduler.config, "--scheduler"):
        assert not samplers.make(kind, scheduler.config, changes).config.get("clip_sample")


def test_what_a_models_scheduler_says_about_clipping_stays():
    from diffusers import DDPMScheduler

    assert samplers.make("DDIMScheduler", DDPMScheduler(clip_sample=True).config).config.clip_sample
