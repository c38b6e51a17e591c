"""DreamBooth with LoRA or DoRA for SDXL: teach Stable Diffusion XL one subject by training small adapters.

    python train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir runs/dog

Add --train_text_encoder to train both text encoders too, and --with_prior_preservation --class_data_dir dogs
--class_prompt "a photo of dog" to keep what the model knows about other dogs. After a kill, the same command with
--resume_from_checkpoint latest goes on exactly.
Leaves pytorch_lora_weights.safetensors, a second file for A1111, ComfyUI and kohya, report.html, samples/ and a model
card in the output folder.
"""

import math

from utils import arguments, preflight


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_dreambooth_data(parser)
    arguments.add_masks(parser)
    arguments.add_prior_preservation(parser)
    arguments.add_text_encoder(parser, text_encoder_lr=5e-6, adam_weight_decay=1e-3)
    arguments.add_pivotal(parser)
    arguments.add_lora(parser, rank=4)
    arguments.add_length(parser, train_batch_size=4)
    arguments.add_optimizer(parser, learning_rate=1e-4, adam_weight_decay=1e-4)
    arguments.add_loss(parser)
    arguments.add_ema(parser)
    arguments.add_memory(parser)
    arguments.add_checkpoints(parser, output_dir="lora-dreambooth-model")
    arguments.add_validation(parser, validation_epochs=50)
    arguments.add_scores(parser)
    arguments.add_logging(parser)
    arguments.add_hub(parser)
    return arguments.parse(parser, argv)


def main(args):
    preflight.check(args)  # folders, photos, model, disk, trackers, hub: nothing slow happens before this
    if args.dry_run:
        return preflight.print_plan(args)

    # Imported here, so that --help and every complaint above answer at once.
    from utils import adapters, cache, checkpoints, datasets, ema, hub, losses, models, noise, optimizers
    from utils import prior, randomness, report, runtime, sam, scores, validation

    call = arguments.caller(args)  # call(f, ...) adds every option that bears the name of a keyword of f
    run = call(
        runtime.start,
        accumulate=args.gradient_accumulation_steps,
        project=args.tracker_project_name,
        config=arguments.public(args),
        max_minutes=args.max_train_minutes,
        resuming=args.resume_from_checkpoint,
    )
    family = call(models.family_of, args.pretrained_model_name_or_path)

    # Class images come first: drawing them needs the memory that training will take.
    class_images = []
    if args.with_prior_preservation:
        class_images = call(
            prior.fill_all,
            run,
            family,
            batch_size=args.sample_batch_size,
            guidance=args.class_guidance_scale,
            precision=args.prior_generation_precision,
        )

    # Photos, and masks by SAM where it is named: it has gone before the model is loaded.
    (photos,) = call(sam.attach, run, call(datasets.photos))

    # Model: the base stays frozen, the adapters learn.
    call(
        family.load,
        run.device,
        run.dtype,
        tokenizer=args.tokenizer_name,
        vae=args.pretrained_vae_model_name_or_path,
    )
    learns = call(
        adapters.attach,
        family,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        dora=args.use_dora,
        targets=args.lora_target_modules,
        text_encoder=args.train_text_encoder,
        seed=run.seed,
    )
    family.configure(args.gradient_checkpointing, xformers=args.enable_xformers_memory_efficient_attention)

    # Data: each photo with a class image beside it; "is_class" tells which is which.
    examples_per_step = args.train_batch_size * args.gradient_accumulation_steps * run.world
    dataset = call(
        datasets.DreamBooth,
        photos,
        datasets.class_pictures(class_images, args.concepts),
        size=args.resolution or family.resolution_default,
        side_factor=family.side_factor,
        examples_per_step=examples_per_step,
        interpolation=args.image_interpolation_mode,
        seed=run.seed,
    )
    if run.is_main:
        report.preview(dataset, run.output_dir)
        report.contact_sheet(dataset, run.output_dir, family.count_tokens, family.prompt_limit)
    cache.latents(run, family, dataset, args.cache_latents)
    if not (args.train_text_encoder or args.train_text_encoder_ti):
        family.cache_prompts([*dataset.captions(), *args.validation_prompt])  # then the encoder is released

    # Optimizer.
    total_steps = run.length(args, len(photos), len(dataset), examples_per_step)
    scale = examples_per_step if args.scale_lr else 1
    optimizer = call(
        optimizers.create,
        args.optimizer,
        learns.groups(
            args.learning_rate * scale,
            text_encoder_lr=args.text_encoder_lr and args.text_encoder_lr * scale,
            weight_decay=args.adam_weight_decay,
            text_encoder_weight_decay=args.adam_weight_decay_text_encoder,
        ),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        eight_bit=args.use_8bit_adam,
    )
    optimizer = call(run.prepare, family, learns, optimizer)
    schedule = optimizers.schedule(
        optimizer, args.lr_scheduler, args.lr_warmup_steps, total_steps, args.lr_num_cycles, args.lr_power
    )
    average = call(ema.create, learns, total_steps)
    corruption = call(noise.corruption_for, family.scheduler)

    # Resume from the newest checkpoint in the output folder, if that is asked for and there is one.
    saved = checkpoints.Checkpoints(
        run.output_dir,
        whole=run.whole,
        keep=args.checkpoints_total_limit,
        verify=args.verify_checkpoint,
        state={
            "weights": (learns.save, learns.load),
            "optimizer": optimizer,
            "schedule": schedule,
            "scaler": run.scaler,
            "ema": average if args.use_ema else None,
        },
        identity=learns.describe()
        | arguments.identity(args)  # options that change what is learned
        | {
            "base_model": args.pretrained_model_name_or_path,
            "revision": args.revision,
            "dataset": dataset.fingerprint(),
            "resolution": dataset.resolution,
            "seed": run.seed,
            "examples_per_step": [args.train_batch_size, args.gradient_accumulation_steps, run.world],
            "optimizer": args.optimizer,
            "precision": str(run.dtype),
            "prediction_type": corruption.prediction_type,
        },
    )
    first_step = saved.resume(args.resume_from_checkpoint, args.allow_resume_mismatch)
    loader = datasets.loader(
        dataset,
        args.train_batch_size,
        rank=run.rank,
        world=run.world,
        accumulate=args.gradient_accumulation_steps,
        first_step=first_step,
        workers=args.dataloader_num_workers,
    )

    judges = call(scores.create, run, photos)
    sampler = validation.Sampler(
        run,
        family,
        args.validation_prompt,
        count=args.num_validation_images,
        steps=args.validation_num_inference_steps,
        guidance=args.validation_guidance_scale,
        scheduler=args.validation_scheduler,
        size=dataset.size,
        judges=judges,
    )
    steps_per_epoch = math.ceil(len(dataset) / examples_per_step)
    validation_steps = args.validation_steps or steps_per_epoch * (args.validation_epochs or 0)
    page = report.Report(run, total_steps, defaults=arguments.defaults(args))

    def validate(step):
        with run.phase("validation"):
            with average.swapped(), run.whole():
                sampler.draw(step)
            page.write()

    if first_step == 0 and validation_steps:
        validate(0)  # what the model drew before it learned anything
    with run.saving_first(saved):  # an error ends the run: what was learned is saved before
        for step, batch in run.steps(loader, first_step, total_steps):
            learns.settle(step, total_steps)  # text encoders may stop before the rest
            draws = randomness.Draws(run.seed, batch["ids"], run.device)
            with run.accumulate(learns):
                latents = family.latents(batch, draws)  # pixels => (b, 4, h, w)
                noisy = corruption(latents, draws)  # inputs, timesteps, target, weight
                prediction = family.predict(noisy.inputs, noisy.timesteps, family.condition(batch, draws))
                error = losses.error(prediction, noisy, batch.get("mask"), args.unmasked_weight)  # (b,)
                loss, parts = losses.dreambooth(error, noisy.weight, batch["is_class"], args.prior_loss_weight)
                zero = losses.against_zero(error, noisy, batch, args.unmasked_weight, args.prior_loss_weight)
                # The facts are looked at only when the loss is no number, to name the example.
                facts = {"timesteps": noisy.timesteps, "error": error.detach()}
                run.backward(
                    loss, learns, optimizer, schedule, max_norm=args.max_grad_norm, parts=parts, zero=zero, **facts
                )

            run.log(step)
            if run.due(step, 1):
                average.update(step)
            if run.due(step, average.snapshot_steps):  # before the checkpoint, after which a resumed run goes on
                with run.phase("saving"):
                    average.snapshot(step)
            if run.due(step, args.checkpointing_steps):
                with run.phase("saving"):
                    saved.save(step)
            if run.due(step, validation_steps) and step < total_steps:
                validate(step)

        if run.stopping:
            saved.save(run.step)
            page.write()
            run.finish()

        # Leave behind: weights, sample images, a model card, the report.
        average.snapshot(run.step)  # whether or not one was due
        with run.phase("saving"), average.swapped(), run.whole():
            about = adapters.metadata.of_run(run, dataset)
            run.save_result(learns, lambda folder: call(learns.save, folder, about=about))
            sampler.draw(run.step)
    if run.is_main:
        hub.card(
            run.output_dir,
            base_model=args.pretrained_model_name_or_path,
            kind="dreambooth",
            family=family.label,
            adapters=learns.describe()["method"],
            prompt=[concept.instance_prompt for concept in args.concepts],
            dataset=args.dataset_name,
            facts=learns.describe()
            | {
                "steps": run.step,
                "loss of the last step": run.told.get("loss"),
                "photos": len(photos),
                "class images": len(dataset.classes),
                "examples per step": examples_per_step,
                "learning rate": args.learning_rate * scale,
                "resolution": dataset.resolution,
                "seed": run.seed,
            },
            model_id=args.hub_model_id,
            diverged=run.diverged,
        )
    page.write()
    run.done("the adapters")
    published = True
    if args.push_to_hub and run.is_main:
        published = hub.publish(run.output_dir, args.hub_model_id, private=args.hub_private, give_up=run.stop.requested)
    run.finish(0 if published else hub.NOT_PUBLISHED)


if __name__ == "__main__":
    main(parse_args())
