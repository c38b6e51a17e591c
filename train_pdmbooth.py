"""PDMBooth: DreamBooth with a loss that keeps what one layer asks about the photos; Stable Diffusion 1.x / 2.x / XL.

    python train_pdmbooth.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --class_prompt "a photo of dog" \\
        --use_inst_loss --use_pdm_loss --output_dir runs/dog

Three losses: of the photos (on unless --use_inst_loss no is given), of class images
(--use_prior_loss) and of queries (--use_pdm_loss); masks for each. PDMBooth's own names of options work too.
Leaves a pipeline for `from_pretrained`, report.html, samples/ and a model card in the output folder.
"""

import math

from utils import arguments, preflight


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__, arguments.PDMBOOTH)
    arguments.add_model(parser)
    arguments.add_dreambooth_data(parser)
    arguments.add_pdm(parser, pdm_loss_weight=0.1)
    arguments.add_masks(parser)
    arguments.add_prior_preservation(parser)
    arguments.add_text_encoder(parser)
    arguments.add_length(parser, train_batch_size=4)
    arguments.add_optimizer(parser, learning_rate=1e-6)
    arguments.add_loss(parser)
    arguments.add_ema(parser)
    arguments.add_full_training(parser)
    arguments.add_memory(parser)
    arguments.add_checkpoints(parser, output_dir="pdmbooth-model")
    arguments.add_validation(parser, validation_steps=100)
    arguments.add_scores(parser)
    arguments.add_logging(parser, tracker_project_name="PDMBooth")
    arguments.add_hub(parser)
    return arguments.parse(parser, argv)


def main(args):
    preflight.check(args)  # folders, photos, model, disk, trackers, hub: nothing slow happens before this
    if args.dry_run:
        return preflight.print_plan(args)

    # Imported here, so that --help and every complaint above answer at once.
    from utils import cache, checkpoints, datasets, ema, hub, learning, losses, masks, models, noise
    from utils import optimizers, pdm, prior, randomness, report, runtime, sam, scores, validation

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
    photos = call(datasets.photos)
    class_photos = datasets.class_pictures(class_images, args.concepts)
    if args.mask_prior:
        class_photos = masks.attach(class_photos, needed=False)
    photos, class_photos = call(sam.attach, run, photos, class_photos)

    # Model: the UNet (and the text encoder) learn, in fp32; the rest stays frozen.
    call(
        family.load,
        run.device,
        run.dtype,
        tokenizer=args.tokenizer_name,
        vae=args.pretrained_vae_model_name_or_path,
    )
    learns = call(learning.full, family, text_encoder=args.train_text_encoder)
    family.configure(args.gradient_checkpointing, xformers=args.enable_xformers_memory_efficient_attention)

    # Data: each photo with a class image beside it; "is_class" tells which is which.
    examples_per_step = args.train_batch_size * args.gradient_accumulation_steps * run.world
    dataset = call(
        datasets.DreamBooth,
        photos if args.mask_dm else masks.without(photos),
        class_photos,
        size=args.resolution or family.resolution_default,
        side_factor=family.side_factor,
        examples_per_step=examples_per_step,
        interpolation=args.image_interpolation_mode,
        seed=run.seed,
    )
    if run.is_main:
        report.preview(dataset, run.output_dir)
        report.contact_sheet(dataset, run.output_dir, family.count_tokens, family.prompt_limit, photos)

    # The bank: what the untouched model asks about each photo, at the timesteps of its inversion.
    bank = call(pdm.prepare, run, family, dataset, photos)
    cache.latents(run, family, dataset, args.cache_latents)
    if not args.train_text_encoder:
        # Then the encoder is released.
        family.cache_prompts([*dataset.captions(), *args.validation_prompt, *args.test_prompts])

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
        | bank.describe()
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
    tests = validation.Sampler(
        run,
        family,
        args.test_prompts,
        count=args.num_test_imgs_per_prompt,
        steps=args.validation_num_inference_steps,
        guidance=args.validation_guidance_scale,
        scheduler=args.validation_scheduler,
        size=dataset.size,
        folder="test_samples",
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
            draws = randomness.Draws(run.seed, batch["ids"], run.device)
            with run.accumulate(learns):
                latents = family.latents(batch, draws)  # pixels => (b, 4, h, w)
                noisy = corruption(latents, draws)  # inputs, timesteps, target, weight
                condition = family.condition(batch, draws)
                # The photos once more, in the same pass, and what is asked about them held against the bank.
                prediction, queries_error = bank.predict(family, noisy, condition, batch)  # (b, ...), (photos,)
                error = losses.error(prediction, noisy, batch.get("mask"), args.unmasked_weight)  # (b,)
                loss, parts = losses.dreambooth(
                    error, noisy.weight, batch["is_class"], args.prior_loss_weight, instance_weight=args.use_inst_loss
                )
                parts["pdm"] = losses.part(queries_error)
                loss = loss + args.pdm_loss_weight * parts["pdm"].mean
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
            run.save_result(
                learns, lambda folder: family.save_pipeline(folder, skip_text_encoder=args.skip_save_text_encoder)
            )
            sampler.draw(run.step)
            tests.draw(run.step)
    if run.is_main:
        hub.card(
            run.output_dir,
            base_model=args.pretrained_model_name_or_path,
            kind="pdmbooth",
            family=family.label,
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
    if run.is_main:
        bank.close()
        if args.del_cls_imgs_dir and args.with_prior_preservation:
            prior.remove_drawn(args.concepts)
    run.done("the pipeline")
    published = True
    if args.push_to_hub and run.is_main:
        published = hub.publish(run.output_dir, args.hub_model_id, private=args.hub_private, give_up=run.stop.requested)
    run.finish(0 if published else hub.NOT_PUBLISHED)


if __name__ == "__main__":
    main(parse_args())
